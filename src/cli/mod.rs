//! The command line: options (flags and their `TANDEM_…` twins, read nowhere else) and one file per command.
//! Errors are printed once, here: one line, exit code 2 for usage, 130 for Ctrl-C and 1 for every other.

mod bench;
mod chat;
mod generate;
pub mod inspect;
mod load;
mod logits;
pub mod plan;
pub mod probe;
mod run;
mod timeline;
pub mod wishes;

use clap::builder::Resettable;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::LazyLock;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// GGUF language models on the whole machine.
#[derive(Parser)]
#[command(
    name = "tandem",
    version = VERSION.as_str(),
    about,
    propagate_version = true,
    before_help = EXAMPLES,
    after_help = "Most options have an environment twin TANDEM_…, shown beside them in each command's help; the option wins."
)]
struct Cli {
    /// What to tell on standard error while at work: error, warn, info or debug, or by module (`tandem::engine=debug`)
    #[arg(long, global = true, env = "TANDEM_LOG", default_value = "warn", value_name = "LEVEL")]
    #[arg(value_parser = |text: &str| text.parse::<Targets>(), hide_env_values = true)]
    log: Targets,
    #[command(subcommand)]
    command: Command,
}

/// Version, build and processor features: `0.1.0 (release, x86_64-linux, avx2)`.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    let (arch, os) = (std::env::consts::ARCH, std::env::consts::OS);
    format!("{} ({build}, {arch}-{os}, {})", env!("CARGO_PKG_VERSION"), tandem_cpu::Isa::detect().name())
});

const EXAMPLES: &str = "\
Examples:
  tandem run                                       chat with the bundled story model
  tandem run model.gguf -p \"Why is the sky blue?\"   one answer
  tandem run model.gguf -f notes.txt -n 200        a prompt from a file (or from standard input)
  tandem plan model.gguf --vram 12G                what would run where, and why
  tandem inspect model.gguf --verify               what is in a file, and whether it is sound
  tandem bench model.gguf -p 512,2048 -n 128       rates, and their share of what the machine can do";

#[derive(Subcommand)]
enum Command {
    /// Generate text: one answer, or a chat on a terminal
    Run(run::RunArgs),
    /// Say what would run where, every byte it takes, how fast it would be, and why
    Plan(plan::PlanArgs),
    /// Show what is in a file
    Inspect(inspect::InspectArgs),
    /// Measure prompt and generation rates
    Bench(bench::BenchArgs),
    /// Write raw logits of given tokens, for parity checks
    Logits(logits::LogitsArgs),
    /// Show the facts about this machine that plans are made from
    Probe(probe::ProbeArgs),
    /// Print a completion script for a shell
    Completions {
        /// Shell to complete for
        shell: clap_complete::Shell,
    },
    /// Print the man page (roff)
    Man,
}

/// A mistake in how the command was called: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Ctrl-C ended the command, which has said so: exit code 130 (128 and the number of the signal, as shells have it).
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
struct Interrupted;

/// An error that ends the command with exit code 2.
fn usage(message: impl Into<String>) -> anyhow::Error {
    Usage(message.into()).into()
}

fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Run(args) => run::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Probe(args) => probe::run(args),
        Command::Completions { shell } => {
            let mut script = Vec::new(); // the generator panics where a write fails
            clap_complete::generate(shell, &mut Cli::command(), "tandem", &mut script);
            Ok(std::io::stdout().write_all(&script)?)
        }
        Command::Man => Ok(clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?),
    }
}

/// A usage error of the argument parser, without its usage lines.
fn one_line(message: &str) -> String {
    let end = ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|part| message.find(part)).min();
    let words: Vec<&str> = message[..end.unwrap_or(message.len())].split_whitespace().collect();
    words.join(" ") + " (see --help)"
}

/// Options that contradict each other, as (command, or any; option; options). Not clap's: to it a variable of the
/// environment contradicts as a flag does, where it should yield to the flag.
const CONFLICTS: &[(&str, &str, &[&str])] = &[
    ("", "plan", &["vram", "ram", "ctx", "kv_dtype", "batch", "threads", "place", "gpu_layers", "machine", "cpu_isa"]),
    ("plan", "plan", &["prompt", "generate"]),
    ("plan", "json", &["why"]),
    ("probe", "known", &["refresh", "json"]),
    ("run", "system", &["no_template"]),
];

/// Parses the command line. Of two options that contradict each other, one from the environment yields to one from the
/// command line; two of the same kind are a mistake.
fn parse() -> Result<Cli, clap::Error> {
    let command = Cli::command();
    let matches = command.clone().try_get_matches()?;
    let Some((name, found)) = matches.subcommand() else { return Cli::from_arg_matches(&matches) };
    let options = command.find_subcommand(name).expect("it was just matched");
    let arg = |id: &str| options.get_arguments().find(|a| a.get_id() == id);
    let given = |id: &str| arg(id).and_then(|_| found.value_source(id)).filter(|s| *s != ValueSource::DefaultValue);
    let mut yielding = Vec::new();
    for (_, one, others) in CONFLICTS.iter().filter(|(of, ..)| of.is_empty() || *of == name) {
        for other in *others {
            match (given(one), given(other)) {
                (Some(ValueSource::CommandLine), Some(ValueSource::EnvVariable)) => yielding.push(*other),
                (Some(ValueSource::EnvVariable), Some(ValueSource::CommandLine)) => yielding.push(*one),
                (Some(source), Some(_)) => {
                    let spelled = |id: &str| {
                        let arg = arg(id).expect("it was given");
                        match arg.get_env().filter(|_| source == ValueSource::EnvVariable) {
                            Some(variable) => variable.to_string_lossy().into_owned(),
                            None => format!("--{}", arg.get_long().expect("all of these have long names")),
                        }
                    };
                    let message = format!("{} cannot be used with {}", spelled(one), spelled(other));
                    return Err(clap::Error::raw(ErrorKind::ArgumentConflict, message));
                }
                _ => {}
            }
        }
    }
    let without = |options: clap::Command| {
        yielding.iter().fold(options, |options, id| options.mut_arg(id, |arg| arg.env(Resettable::Reset)))
    };
    Cli::from_arg_matches(&command.mut_subcommand(name, without).try_get_matches()?)
}

/// Runs the command line and returns the exit code: 0, 2 for usage, 130 for Ctrl-C, 1 for every other error.
pub fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(help) if !help.use_stderr() => {
            let _ = help.print(); // --help and --version
            return ExitCode::SUCCESS;
        }
        Err(help) if help.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = help.print();
            return ExitCode::from(2);
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{}", one_line(&error.to_string()));
            return ExitCode::from(2);
        }
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).without_time();
    let lines = lines.with_ansi(std::io::stderr().is_terminal());
    tracing_subscriber::registry().with(lines).with(cli.log).init();
    let Err(error) = dispatch(cli.command) else { return ExitCode::SUCCESS };
    let broken_pipe = error.chain().any(|cause| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    });
    if broken_pipe {
        return ExitCode::SUCCESS; // the reader of our output has left: nothing is wrong
    }
    if error.is::<Interrupted>() {
        return ExitCode::from(130);
    }
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
    ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
}
