//! The launcher that people use by hand.

mod run;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A launcher for microVMs.
#[derive(Parser)]
#[command(name = "vesiclectl", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
}

fn main() -> ExitCode {
    let Command::Run(run) = Arguments::parse().command;
    match run.run() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprint!("vesiclectl: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::from(run::FAILED)
        }
    }
}
