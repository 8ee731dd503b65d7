//! `vesiclectl bench`: measures VMMs that speak the same API, one beside the other.
//!
//! - [`figures`] says what there is to measure, and what the goals are.
//! - [`experiments`] measures it: each runs a VMM and returns values for one or more figures.
//! - [`subject`] is a VMM under measurement, [`guest`] what runs in it.
//! - [`snapshot`] has those that save and load, [`vsock`] those that talk to the guest.
//! - [`jail`] has those of confinement, [`limits`] those of rate limits.
//! - [`tap`] is the other end of its network.
//! - [`counters`] and [`process`] look at it from outside.
//! - [`report`] is the table and the JSON.

mod counters;
mod experiments;
mod figures;
mod guest;
mod jail;
mod limits;
mod process;
mod report;
mod snapshot;
mod subject;
mod tap;
mod together;
mod vsock;

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use lexopt::{Arg, Parser, ValueExt};

use experiments::{Bench, Experiment};
use figures::Part;
use report::Report;
pub use subject::{Api, Subject};
pub use vsock::dial;

/// What `vesiclectl bench --help` prints.
pub const HELP: &str = "\
Measure VMMs: how fast they start, how much memory they take, what a block request costs.

Usage: vesiclectl bench --part PART --vmm NAME=PATH[:MAPPING]... --kernel FILE --initramfs FILE [OPTION]...
       vesiclectl bench --part PART --json FILE --show

  --part PART          deterministic: with Linux guests, for a clock that counts instructions (tools/lab);
                       native: in real time, what any KVM can do
  --vmm NAME=PATH      a VMM with Vesicle's API; with :Shared or :Private, its image_mapping; may be repeated
  --qemu PATH          measure QEMU's microvm machine too, where the figure makes sense
  --kernel FILE        the tuned kernel (tools/guest kernel-tuned)
  --initramfs FILE     the benchmarks' guest (tools/guest initramfs-bench)
  --runs N             samples per figure (default: 5, native: 20)
  --only FIGURE        only what yields this figure; may be repeated
  --json FILE          add the results to those in FILE
  --show               print the table, with what is in FILE already
  --check NAME         fail if a median of NAME's missed its goal; may be repeated
";

/// Between two ticks of the host's clock (Debian's kernels have 250 in a second).
const TICK: Duration = Duration::from_millis(4);

/// What to measure.
pub struct Arguments {
    part: Part,
    subjects: Vec<Subject>,
    /// None to measure nothing.
    images: Option<Images>,
    runs: usize,
    only: Vec<String>,
    json: Option<PathBuf>,
    show: bool,
    /// Whose goals decide on the exit status.
    check: Vec<String>,
}

/// What the guests boot.
struct Images {
    kernel: PathBuf,
    initramfs: PathBuf,
}

impl Arguments {
    /// Parses what follows `bench`; `None` if help is asked for.
    pub fn parse(parser: &mut Parser) -> Result<Option<Self>, Box<dyn Error>> {
        let (mut part, mut kernel, mut initramfs, mut json, mut runs) = (None, None, None, None, None);
        let (mut subjects, mut only, mut show, mut check) = (Vec::new(), Vec::new(), false, Vec::new());
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Long("part") => part = Some(Part::named(&parser.value()?.string()?)?),
                Arg::Long("vmm") => subjects.push(Subject::parse(&parser.value()?.string()?)?),
                Arg::Long("qemu") => subjects.push(Subject::qemu(parser.value()?.into())),
                Arg::Long("kernel") => kernel = Some(parser.value()?.into()),
                Arg::Long("initramfs") => initramfs = Some(parser.value()?.into()),
                Arg::Long("runs") => runs = Some(parser.value()?.parse()?),
                Arg::Long("only") => only.push(figures::known(parser.value()?.string()?)?),
                Arg::Long("show") => show = true,
                Arg::Long("check") => check.push(parser.value()?.string()?),
                Arg::Long("json") => json = Some(parser.value()?.into()),
                Arg::Long("help") | Arg::Short('h') => return Ok(None),
                other => return Err(other.unexpected().into()),
            }
        }
        let part = part.ok_or("name a --part")?;
        let names: Vec<_> = subjects.iter().map(Subject::name).collect();
        if let Some(twice) = (1..names.len()).find(|&index| names[..index].contains(&names[index])) {
            return Err(format!("two VMMs are called {}, and would be one in the results", names[twice]).into());
        }
        let images = match (kernel, initramfs) {
            (Some(kernel), Some(initramfs)) => Some(Images { kernel, initramfs }),
            (None, None) if show => None,
            _ => return Err("name a --kernel and an --initramfs".into()),
        };
        Ok(Some(Self {
            part,
            subjects,
            images,
            runs: runs.unwrap_or(if part == Part::Native { 20 } else { 5 }).max(1),
            only,
            json,
            show,
            check,
        }))
    }

    /// Measures, prints the table, writes the JSON. Returns the exit status: 1 if something could not be measured, or
    /// missed its goal and that was to be checked.
    pub fn run(self) -> Result<u8, Box<dyn Error>> {
        let mut report = Report::load(self.part, self.json.as_deref());
        let mut status = 0;
        if let Some(images) = &self.images {
            let bench = Bench::prepare(self.part, self.subjects.clone(), &images.kernel, &images.initramfs)?;
            for experiment in experiments::of(self.part).filter(|experiment| self.wants(experiment)) {
                eprintln!("vesiclectl: measuring {}", experiment.figures.join(", "));
                status |= self.measure(&bench, experiment, &mut report);
                // Whatever happens to the next, this one is kept.
                if let Some(path) = &self.json {
                    report.save(path)?;
                }
            }
        }
        if self.show {
            print!("{}", report.table());
        }
        for subject in &self.check {
            for what in report.missed(subject) {
                eprintln!("vesiclectl: {subject} missed a goal: {what}");
                status = 1;
            }
        }
        Ok(status)
    }

    fn wants(&self, experiment: &Experiment) -> bool {
        self.only.is_empty() || experiment.figures.iter().any(|id| self.only.iter().any(|only| only == id))
    }

    /// Measures all subjects, alternating, so that what changes on the machine meanwhile is spread over all of them.
    fn measure(&self, bench: &Bench, experiment: &Experiment, report: &mut Report) -> u8 {
        // The first round warms up.
        let rounds = if experiment.repeats { 1 + self.runs } else { 1 };
        let mut samples = vec![Ok(Vec::new()); bench.subjects().len()];
        for round in 0..rounds {
            for (subject, samples) in bench.subjects().iter().zip(&mut samples) {
                if let Ok(list) = samples
                    && (experiment.for_qemu || !subject.is_qemu())
                {
                    begin_at(TICK * round as u32 / rounds as u32);
                    match (experiment.run)(bench, subject) {
                        Ok(values) => list.push(values),
                        Err(error) => *samples = Err(error.to_string()),
                    }
                }
            }
        }
        let mut status = 0;
        for (subject, samples) in bench.subjects().iter().zip(samples) {
            match samples {
                Ok(list) => report.add(subject.name(), list.get(usize::from(experiment.repeats)..).unwrap_or_default()),
                Err(error) => {
                    eprintln!("vesiclectl: {}: {error}", subject.name());
                    status = 1;
                }
            }
        }
        status
    }
}

/// Waits until the clock is so far past a multiple of [`TICK`]. With virtual time all runs are alike: without this, the
/// same instruction would be interrupted in all of them.
fn begin_at(phase: Duration) {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos() as u64;
    let tick = TICK.as_nanos() as u64;
    std::thread::sleep(Duration::from_nanos((phase.as_nanos() as u64 + tick - now % tick) % tick));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmms_are_measured_under_names_of_their_own() {
        let parse = |vmms: &str| {
            let line = format!("--part native --kernel k --initramfs i {vmms}");
            Arguments::parse(&mut Parser::from_args(line.split_whitespace())).map(|_| ()).map_err(|e| e.to_string())
        };
        assert_eq!(parse("--vmm a=x --vmm b=x --qemu y"), Ok(()));
        for vmms in ["--vmm a=x --vmm b=y --vmm a=z", "--vmm a=x --vmm a=x:Shared"] {
            assert_eq!(parse(vmms), Err("two VMMs are called a, and would be one in the results".to_owned()));
        }
        assert!(parse("--vmm qemu=x --qemu y").is_err());
    }
}
