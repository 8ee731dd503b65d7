//! The launcher that people use by hand.

mod bench;
mod clone;
mod http;
mod image;
mod jail;
mod net;
mod run;
mod snapshot;
mod warm;

use std::error::Error;
use std::process::ExitCode;

use lexopt::{Arg, Parser};

const HELP: &str = "\
A launcher for microVMs.

Usage: vesiclectl run [OPTION]... [-- COMMAND...]
       vesiclectl image build --output FILE [OPTION]... SOURCE
       vesiclectl snapshot inspect|verify|merge|record FILE...
       vesiclectl clone OPTION... N
       vesiclectl bench OPTION...

  run        run a command in a microVM
  image      make a root file system
  snapshot   look at snapshots, merge them, note what their first run touches
  clone      run many microVMs from one snapshot, and measure them
  bench      measure VMMs

`vesiclectl SUBCOMMAND --help` says more.
";

fn main() -> ExitCode {
    let mut failed = 1;
    let ended = command(&mut failed);
    vesiclectl::scratch::settle();
    match ended {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprint!("vesiclectl: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::from(failed)
        }
    }
}

/// Does what the arguments ask for; returns the exit status, which is `failed` after an error.
fn command(failed: &mut u8) -> Result<u8, Box<dyn Error>> {
    let mut parser = Parser::from_env();
    let signals = vesiclectl::scratch::remove_on_signals()?;
    match parser.next().map_err(usage)? {
        Some(Arg::Value(name)) if name == "run" => {
            // The others are the command's.
            *failed = run::FAILED;
            if let Some(run) = run::Run::parse(&mut parser).map_err(usage)? {
                return run.run(&signals);
            }
            print!("{}", run::HELP);
        }
        Some(Arg::Value(name)) if name == "image" => {
            if let Some(build) = image::Build::parse(&mut parser).map_err(usage)? {
                build.run()?;
                return Ok(0);
            }
            print!("{}", image::HELP);
        }
        Some(Arg::Value(name)) if name == "snapshot" => {
            if let Some(task) = snapshot::Task::parse(&mut parser).map_err(usage)? {
                task.run()?;
                return Ok(0);
            }
            print!("{}", snapshot::HELP);
        }
        Some(Arg::Value(name)) if name == "clone" => {
            if let Some(herd) = clone::Herd::parse(&mut parser).map_err(usage)? {
                return herd.run().map(|()| 0);
            }
            print!("{}", clone::HELP);
        }
        Some(Arg::Value(name)) if name == "bench" => {
            if let Some(bench) = bench::Arguments::parse(&mut parser)? {
                return bench.run();
            }
            print!("{}", bench::HELP);
        }
        Some(Arg::Long("help") | Arg::Short('h')) => print!("{HELP}"),
        Some(argument) => return Err(usage(argument.unexpected())),
        None => return Err("name a subcommand; --help lists them".into()),
    }
    Ok(0)
}

/// A message that has its cause in its text already.
fn usage(error: lexopt::Error) -> Box<dyn Error> {
    error.to_string().into()
}
