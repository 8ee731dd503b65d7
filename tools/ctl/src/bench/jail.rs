//! What confinement costs: the processor time of a start until the API answers, the jailer's included.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::experiments::{Bench, Experiment, Outcome, experiment};
use super::subject::{Api, Process, Subject};

/// Mounts of a busy host.
const MOUNTS: usize = 300;
/// Starts at once.
const CROWD: usize = 10;

/// Without a mount namespace.
const SHARED: &[&str] = &["--no-mount-ns"];

/// The measurements.
pub const EXPERIMENTS: &[Experiment] = &[
    experiment(&["bare-cpu"], bare),
    experiment(&["jail-cpu"], |bench, subject| one(bench, subject, "jail-cpu", &[])),
    experiment(&["jail-cpu-300"], |bench, subject| {
        let _mounts = Mounts::new(bench.files().path("mounts"))?;
        one(bench, subject, "jail-cpu-300", &[])
    }),
    experiment(&["jail-ten"], |bench, subject| crowd(bench, subject, "jail-ten", &[])),
    experiment(&["chroot-cpu"], |bench, subject| one(bench, subject, "chroot-cpu", SHARED)),
    experiment(&["chroot-cpu-300"], |bench, subject| {
        let _mounts = Mounts::new(bench.files().path("mounts"))?;
        one(bench, subject, "chroot-cpu-300", SHARED)
    }),
    experiment(&["chroot-ten"], |bench, subject| crowd(bench, subject, "chroot-ten", SHARED)),
];

fn bare(bench: &Bench, subject: &Subject) -> Outcome {
    if subject.jailer().is_none() {
        return Ok(Vec::new());
    }
    let api = bench.launch(subject, &["--no-seccomp", "--no-landlock"])?;
    Ok(vec![("bare-cpu", api.process.cpu_time()?.as_secs_f64())])
}

/// A VMM that is being jailed, and where its socket will be.
fn jail(
    bench: &Bench,
    subject: &Subject,
    id: &str,
    more: &[&str],
) -> Result<Option<(Process, PathBuf)>, Box<dyn Error>> {
    let Some(jailer) = subject.jailer() else { return Ok(None) };
    let base = bench.files().path("jails");
    let program = subject.path();
    let name = program.file_name().ok_or("the program has no name")?;
    let socket = base.join(name).join(id).join("root/run/api.sock");
    let _ = fs::remove_file(&socket);
    let (program, base) = (program.to_string_lossy(), base.to_string_lossy());
    let own = ["--id", id, "--exec-file", &program, "--uid", "20000", "--gid", "20000", "--chroot-base-dir", &base];
    let process = Process::start(jailer, &[&own[..], more, &["--", "--api-sock", "/run/api.sock"]].concat())?;
    Ok(Some((process, socket)))
}

/// One start, in a jail that exists: the second and later ones count.
fn one(bench: &Bench, subject: &Subject, figure: &'static str, more: &[&str]) -> Outcome {
    let Some((process, socket)) = jail(bench, subject, "one", more)? else { return Ok(Vec::new()) };
    let api = Api::connect(process, &socket, bench.pause())?;
    Ok(vec![(figure, api.process.cpu_time()?.as_secs_f64())])
}

/// Many at once; what one of them takes.
fn crowd(bench: &Bench, subject: &Subject, figure: &'static str, more: &[&str]) -> Outcome {
    let mut started = Vec::new();
    for number in 0..CROWD {
        started.extend(jail(bench, subject, &format!("crowd-{number}"), more)?);
    }
    let (mut cpu, mut apis) = (0.0, Vec::new());
    for (process, socket) in started {
        let api = Api::connect(process, &socket, bench.pause())?;
        cpu += api.process.cpu_time()?.as_secs_f64();
        // None ends before all have started.
        apis.push(api);
    }
    Ok(if apis.is_empty() { Vec::new() } else { vec![(figure, cpu / apis.len() as f64)] })
}

/// Further mounts, as long as this lives.
struct Mounts(Vec<PathBuf>);

impl Mounts {
    fn new(dir: PathBuf) -> Result<Self, Box<dyn Error>> {
        let mut mounts = Self(Vec::new());
        for number in 0..MOUNTS {
            let at = dir.join(number.to_string());
            fs::create_dir_all(&at)?;
            mount("bench", &at, "tmpfs", MountFlags::empty(), c"size=4k")?;
            mounts.0.push(at);
        }
        Ok(mounts)
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        for at in &self.0 {
            let _ = unmount(Path::new(at), UnmountFlags::DETACH);
        }
    }
}
