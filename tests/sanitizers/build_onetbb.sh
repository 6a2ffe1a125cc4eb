#!/usr/bin/env bash
# Builds the distribution's oneTBB with ThreadSanitizer into a folder (default: .deps/onetbb-tsan, where the preset
# cpu-tsan looks for it). Without that TSan does not see how oneTBB's threads wait for each other, and reports races
# that are none. Takes the source package of the installed version (2 MB) from the package sources that this system
# already uses; changes nothing outside the folder. Half a minute on two cores; a second run does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "${1:-.deps}"
target=$(cd "${1:-.deps}" && pwd)
[[ $# -gt 0 ]] || target+=/onetbb-tsan
version=$(dpkg-query -W -f '${source:Version}' libtbb-dev)
[[ $(cat "$target/.version" 2>/dev/null) != "$version" ]] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The package sources of the system, as sources of source packages, in lists of our own.
mkdir -p "$work"/{parts,lists/partial}
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [[ ! -f $file ]] || sed -n 's/^deb /deb-src /p' "$file" >>"$work/parts/all.list"
done
for file in /etc/apt/sources.list.d/*.sources; do
  [[ ! -f $file ]] || sed 's/^Types:.*/Types: deb-src/' "$file" >"$work/parts/${file##*/}"
done
apt=(apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$work/parts"
  -o "Dir::State::lists=$work/lists" -o "Dir::Cache::srcpkgcache=$work/src.bin" -o "Dir::Cache::pkgcache=$work/pkg.bin"
  -o APT::Sandbox::User=root)
"${apt[@]}" update || true # a source without source packages is no loss
(cd "$work" && "${apt[@]}" source --download-only "onetbb=$version")
mkdir "$work/onetbb"
tar -xf "$work"/onetbb_*.orig.tar.* -C "$work/onetbb" --strip-components=1
launcher=()
if command -v ccache >/dev/null; then launcher=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache); fi
cmake -S "$work/onetbb" -B "$work/build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTBB_SANITIZE=thread -DTBB_TEST=OFF \
  -DTBBMALLOC_BUILD=OFF -DTBB_STRICT=OFF "-DCMAKE_INSTALL_PREFIX=$target" "${launcher[@]}" >"$work/log" 2>&1 &&
  cmake --build "$work/build" -j "$(nproc)" >"$work/log" 2>&1 && cmake --install "$work/build" >"$work/log" 2>&1 ||
  { cat "$work/log" >&2; exit 1; }
echo "$version" >"$target/.version"
echo "oneTBB $version with ThreadSanitizer: $target"
