// The lighter program: reads the command line, runs a command, and turns errors into messages and exit codes.
#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/error.h"

namespace {

constexpr int kFailure = 1;
constexpr int kUserMistake = 2;
constexpr int kInterrupted = 130;

int report(const std::string& message, int code) {
  std::fprintf(stderr, "lighter: %s\n", message.c_str());
  return code;
}

void add_common(CLI::App& command, lighter::cli::CommonOptions& options) {
  command.add_option("CONFIG", options.config, "The YAML file that describes model, device and budgets")
      ->required();
  command.add_option("--set", options.overrides, "Overrides a key of the file; may be repeated")
      ->type_name("KEY.PATH=VALUE")
      ->expected(1)
      ->take_all();
  command.add_flag("--json", options.json, "Writes one JSON object to stdout");
}

constexpr long long kManyTokens = 1ll << 40;

void add_plan(CLI::App& app, lighter::cli::PlanOptions& options) {
  CLI::App* command =
      app.add_subcommand("plan", "Shows where every byte would go, whether it fits, and how fast it will be");
  add_common(*command, options.common);
  command->add_option("--calibration", options.calibration,
                      "What lighter calibrate wrote on the machine to plan for; default: what it kept here");
}

void add_calibrate(CLI::App& app, lighter::cli::CalibrateOptions& options) {
  CLI::App* command = app.add_subcommand(
      "calibrate", "Measures the rates that predicted speeds rest on, on the configuration's device");
  add_common(*command, options.common);
  command->add_option("--out", options.out, "The file to write; default: where lighter plan looks");
}

void add_eval(CLI::App& app, lighter::cli::EvalOptions& options) {
  CLI::App* command = app.add_subcommand("eval", "Measures the perplexity of a text");
  add_common(*command, options.common);
  command->add_option("--text", options.text, "The text file")->required();
  command->add_option("--tokens", options.tokens, "Only so many tokens from its beginning")
      ->check(CLI::Range(1ll, kManyTokens));
}

void add_quantize(CLI::App& app, lighter::cli::QuantizeOptions& options) {
  CLI::App* command = app.add_subcommand(
      "quantize",
      "Writes a model's folder anew in the configuration's formats, int4 rounded by what a text does in it");
  add_common(*command, options.common);
  auto* text =
      command->add_option("--text", options.text,
                          "A text file of the kind that the model is for; for int4, which is rounded by it");
  command->add_option("--out", options.out, "The folder to write")->required();
  command->add_option("--tokens", options.tokens, "Only so many tokens from the text's beginning")
      ->check(CLI::Range(1ll, kManyTokens))
      ->needs(text);
}

void add_trace(CLI::App& app, lighter::cli::TraceOptions& options) {
  CLI::App* command = app.add_subcommand("trace", "Records which experts a model chooses");
  add_common(*command, options.common);
  command->add_option("--out", options.out, "The file to write")->required();
  CLI::Option_group* input = command->add_option_group("input", "What the model reads");
  auto* text = input->add_option("--text", options.text, "A text file, in windows that fill the context");
  input->add_option("--prompt", options.prompt.text, "A text to continue");
  input->add_option("--prompt-ids", options.prompt.ids, "The same as token ids, 1,2,3")->delimiter(',');
  input->require_option(1);
  command->add_option("--tokens", options.tokens, "With --text: only so many tokens from its beginning")
      ->check(CLI::Range(1ll, kManyTokens))
      ->needs(text);
  command->add_option("--max-tokens", options.max_tokens, "With a prompt: generates at most so many tokens")
      ->check(CLI::Range(0ll, kManyTokens))
      ->excludes(text);
}

void add_replay(CLI::App& app, lighter::cli::ReplayOptions& options) {
  CLI::App* command = app.add_subcommand("replay", "Shows what each residency policy makes of a trace");
  command->add_option("TRACE", options.trace, "A file that `lighter trace` wrote")->required();
  command->add_option("--policy", options.policy, "static, lru, lfu or all")
      ->check(CLI::IsMember({"static", "lru", "lfu", "all"}));
  command
      ->add_option("--resident", options.resident,
                   "Share of each layer's slices on the device; may be repeated")
      ->expected(1)
      ->take_all()
      ->check(CLI::Range(0.0, 1.0));
  command->add_option("--prefetch-depth", options.prefetch_depth,
                      "Only what was guessed so many layers ahead; 0: no prefetch");
  command->add_flag("--json", options.json, "Writes one JSON object to stdout");
}

void add_bench(CLI::App& app, lighter::cli::BenchOptions& options) {
  CLI::App* command =
      app.add_subcommand("bench", "Measures a sweep of configurations, and writes data and a report");
  command->add_option("SWEEP", options.sweep, "The YAML file that describes the sweep")->required();
  command->add_option("--out", options.out, "The folder to write to")->required();
  command->add_flag("--resume", options.resume, "Goes on where an earlier run of the sweep ended");
  command->add_flag("--json", options.json, "Writes the results to stdout too");
}

void add_compare(CLI::App& app, lighter::cli::CompareOptions& options) {
  CLI::App* command =
      app.add_subcommand("compare", "Shows what changed beyond noise between two results of bench");
  command->add_option("BEFORE", options.before, "A results.json")->required();
  command->add_option("AFTER", options.after, "Another one")->required();
  command->add_flag("--json", options.json, "Writes one JSON object to stdout");
}

int dispatch(int argc, char** argv) {
  using namespace lighter::cli;
  CLI::App app("Runs Mixture-of-Experts models that are too large for one GPU.", "lighter");
  app.require_subcommand(1);
  app.set_version_flag("--version", "lighter 0.1.0");

  RunOptions run;
  CLI::App* run_app = app.add_subcommand("run", "Generates text");
  add_common(*run_app, run.common);
  auto* prompt = run_app->add_option("--prompt", run.prompt.text, "The text to continue");
  auto* ids =
      run_app->add_option("--prompt-ids", run.prompt.ids, "The same as token ids, 1,2,3")->delimiter(',');
  ids->excludes(prompt);
  auto* chat = run_app->add_flag("--chat", run.prompt.chat, "Puts the prompt into the model's chat format");
  chat->needs(prompt);
  run_app->add_option("--system", run.prompt.system, "The system message, with --chat")->needs(chat);
  run_app->add_option("--max-tokens", run.max_tokens, "Generates at most so many tokens")
      ->check(CLI::Range(0ll, kManyTokens));
  run_app->add_option("--logprobs", run.logprobs, "With --json: the so many likeliest tokens at each place")
      ->check(CLI::Range(0, 1000));

  PlanOptions plan;
  add_plan(app, plan);
  CalibrateOptions calibrate;
  add_calibrate(app, calibrate);
  EvalOptions eval;
  add_eval(app, eval);
  QuantizeOptions quantize;
  add_quantize(app, quantize);
  TraceOptions trace;
  add_trace(app, trace);
  ReplayOptions replay;
  add_replay(app, replay);
  BenchOptions bench;
  add_bench(app, bench);
  CompareOptions compare;
  add_compare(app, compare);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUserMistake;
  }
  if (app.got_subcommand("plan")) return plan_command(plan);
  if (app.got_subcommand("calibrate")) return calibrate_command(calibrate);
  if (app.got_subcommand("eval")) return eval_command(eval);
  if (app.got_subcommand("quantize")) return quantize_command(quantize);
  if (app.got_subcommand("trace")) return trace_command(trace);
  if (app.got_subcommand("replay")) return replay_command(replay);
  if (app.got_subcommand("bench")) return bench_command(bench);
  if (app.got_subcommand("compare")) return compare_command(compare);
  return run_command(run);
}

}  // namespace

int main(int argc, char** argv) {
  lighter::cli::catch_ctrl_c();
  lighter::cli::log_to_stderr();
  try {
    return dispatch(argc, argv);
  } catch (const lighter::Interrupted&) {
    return report("interrupted", kInterrupted);
  } catch (const lighter::ConfigError& error) {
    return report(error.what(), kUserMistake);
  } catch (const lighter::CheckpointError& error) {
    return report(error.what(), kUserMistake);
  } catch (const lighter::CapacityError& error) {
    return report(error.what(), kUserMistake);
  } catch (const c10::OutOfMemoryError& error) {
    return report(
        "the device's workspace is used up; lower memory.prefill_chunk or memory.context (libtorch: " +
            std::string(error.what_without_backtrace()) + ")",
        kUserMistake);
  } catch (const c10::Error& error) {
    return report(std::string("libtorch: ") + error.what_without_backtrace(), kFailure);
  } catch (const std::exception& error) {
    return report(error.what(), kFailure);
  }
}
