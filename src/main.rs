//! The `tandem` binary: everything happens in [`tandem::cli`].

fn main() -> std::process::ExitCode {
    tandem::cli::main()
}
