//! The command line: options (flags and their environment twins), and one file per command.

pub mod inspect;
pub mod plan;
pub mod probe;
pub mod wishes;

/// Runs the command line and returns the exit code: 0, 2 for usage, 1 for every other error.
pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
