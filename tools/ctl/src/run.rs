//! `vesiclectl run`: one command, one microVM.

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use lexopt::{Arg, Parser, ValueExt};
use rustix::termios::{self, OptionalActions, Termios};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use vesiclectl::{BOOT_ARGS, ClientError, Job, Script, Signaller, Vesicle, scratch};

use crate::jail::Jail;
use crate::net::Network;
use crate::warm::{Guest, Put, Warm};

/// The status of a run that did not come to a command's own status.
pub const FAILED: u8 = 125;

/// What `vesiclectl run --help` prints.
pub const HELP: &str = "\
Runs a command in a microVM of its own.

Usage: vesiclectl run --vesicle FILE --kernel FILE [OPTION]... [-- COMMAND...]

  --vesicle FILE      the VMM to run
  --jailer FILE       confine it with this jailer too, as strictly as the host allows, and say how in one line
  --kernel FILE       an ELF vmlinux or a bzImage
  --initramfs FILE    the default guest's, or one that runs jobs the same way
  --rootfs FILE       run the command in this root file system, a raw image, which cannot be written to
  --writable          let the guest write to the root file system: what it writes is in the image for good
  --vcpus N           vCPUs, 1 to 32 [default: 1]
  --memory MIB        memory [default: 256]
  --boot-args ARGS    kernel arguments that follow the usual ones, such as loglevel=7 to see the kernel's messages
  --stdin             give the command this standard input
  --snapshots DIR     keep a snapshot of the guest as it waits for a command, and start from that; not with a root file
                      system, a network or arguments of your own, and only the default guest can wait
  --net               let the guest out: a TAP, NAT and forwarding, by ip and nft, as root; eth0 is set up in the guest

No shell looks at COMMAND. Without one there is a shell, which takes a terminal. What the guest writes to its serial
port is standard output. The exit status is the command's; 125 means that there is none, and standard error says why.

On a terminal the command talks to it. Otherwise its standard input is empty, or with --stdin a copy of this one, read
to its end before the guest starts.
";

/// One run.
#[derive(Debug)]
pub struct Run {
    vesicle: PathBuf,
    jailer: Option<PathBuf>,
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    rootfs: Option<PathBuf>,
    writable: bool,
    vcpus: u8,
    memory: u64,
    boot_args: Option<String>,
    stdin: bool,
    snapshots: Option<PathBuf>,
    net: bool,
    command: Vec<OsString>,
}

/// Where the guest's serial port goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Console {
    Terminal,
    Output,
}

impl Run {
    /// Takes the arguments that follow `run`; `None` if they ask for help.
    ///
    /// # Errors
    /// An argument that is unknown, missing or malformed.
    pub fn parse(parser: &mut Parser) -> Result<Option<Self>, lexopt::Error> {
        let (mut vesicle, mut kernel) = (None, None);
        let mut run = Self {
            vesicle: PathBuf::new(),
            jailer: None,
            kernel: PathBuf::new(),
            initramfs: None,
            rootfs: None,
            writable: false,
            vcpus: 1,
            memory: 256,
            boot_args: None,
            stdin: false,
            snapshots: None,
            net: false,
            command: Vec::new(),
        };
        while let Some(argument) = parser.next()? {
            match argument {
                Arg::Long("vesicle") => vesicle = Some(parser.value()?.into()),
                Arg::Long("jailer") => run.jailer = Some(parser.value()?.into()),
                Arg::Long("kernel") => kernel = Some(parser.value()?.into()),
                Arg::Long("initramfs") => run.initramfs = Some(parser.value()?.into()),
                Arg::Long("rootfs") => run.rootfs = Some(parser.value()?.into()),
                Arg::Long("writable") => run.writable = true,
                Arg::Long("vcpus") => run.vcpus = parser.value()?.parse()?,
                Arg::Long("memory") => run.memory = parser.value()?.parse()?,
                Arg::Long("boot-args") => run.boot_args = Some(parser.value()?.string()?),
                Arg::Long("stdin") => run.stdin = true,
                Arg::Long("snapshots") => run.snapshots = Some(parser.value()?.into()),
                Arg::Long("net") => run.net = true,
                Arg::Long("help") | Arg::Short('h') => return Ok(None),
                Arg::Value(first) => run.command = std::iter::once(first).chain(parser.raw_args()?).collect(),
                _ => return Err(argument.unexpected()),
            }
        }
        run.vesicle = vesicle.ok_or("--vesicle is missing")?;
        run.kernel = kernel.ok_or("--kernel is missing")?;
        Ok(Some(run))
    }

    /// Runs the command; returns its exit status. Up to the VMM's start signals are for `before` to handle.
    pub fn run(&self, before: &Handle) -> Result<u8, Box<dyn Error>> {
        let console = match io::stdin().is_terminal() && io::stdout().is_terminal() && !self.stdin {
            true => Console::Terminal,
            false if self.command.is_empty() => return Err("name a COMMAND after --; a shell takes a terminal".into()),
            false => Console::Output,
        };
        let dir = scratch::directory("vesiclectl-", &std::env::temp_dir())?;
        let job = self.job(console, &dir.path().join("job"))?;
        let log = dir.path().join("log");

        let warm = self.warm(console)?;
        let mut network = if self.net { Some(Network::claim()?) } else { None };
        let _terminal = Terminal::save();
        let mut jail = Jail::strictest(self.jailer.as_deref(), &self.vesicle, dir.path())?;
        let requests = match &warm {
            Some(warm) => from_snapshot(&mut jail, warm, job.path())?,
            None => self.boot(&mut jail, job.path(), console, network.as_ref())?,
        };
        if self.jailer.is_some() {
            eprintln!("vesiclectl: the VMM is confined {jail}");
        }
        let mut vesicle = Vesicle::spawn(self.vmm(&jail, console, &log, network.as_ref())?)
            .map_err(|error| format!("cannot run {}: {error}", self.vesicle.display()))?;
        let caught = pass_on_signals(vesicle.signaller())?;
        before.close();
        // Only now that a signal would not leave it behind.
        if network.as_mut().map(Network::up).transpose()? == Some(true) {
            eprintln!("vesiclectl: this machine did not forward packets; net.ipv4.ip_forward is 1 from now on");
        }
        let started = requests.iter().try_for_each(|(path, body)| vesicle.api().must_put(path, body));
        if started.is_err() {
            vesicle.signaller().terminate();
        }
        let ended = vesicle.wait()?;

        match caught.load(Ordering::SeqCst) {
            0 => {}
            signal => return Ok(128 + signal),
        }
        let failed = match (started, ended.success(), job.status()?) {
            (Ok(()), true, Some(status)) => return Ok(status),
            // Refused requests are explained by their replies; where there was none, the log may tell.
            (Err(refused @ ClientError::Refused { .. }), ..) => match warm {
                Some(warm) => {
                    let then = match warm.discard() {
                        Ok(()) => "that snapshot is removed, and the next run makes another".to_owned(),
                        Err(error) => format!("that snapshot cannot be removed: {error}"),
                    };
                    return Err(format!("{refused}; {then}").into());
                }
                None => return Err(refused.into()),
            },
            (Err(error), ..) => Err(format!("the VMM does not answer ({ended}): {error}").into()),
            (Ok(()), true, None) => Err("the guest ended before the command did; \
                --boot-args loglevel=7 shows the kernel's messages"
                .into()),
            (Ok(()), false, _) => Err(format!("the VMM failed ({ended})").into()),
        };
        show_tail(&log);
        failed
    }

    /// What the guest finds on its job drive.
    fn job(&self, console: Console, path: &Path) -> io::Result<Job> {
        match console {
            Console::Terminal => {
                let mut script = Script::new();
                if let Ok(size) = termios::tcgetwinsize(io::stdout()) {
                    script = script.line(format!("stty rows {} cols {} 2>/dev/null", size.ws_row, size.ws_col));
                }
                if let Some(term) = std::env::var_os("TERM") {
                    script = script.line([b"export TERM=", &*vesiclectl::quote(&term)].concat());
                }
                let shell = ["sh".into(), "-l".into()];
                Job::create(path, script.exec("", if self.command.is_empty() { &shell } else { &self.command }))
            }
            Console::Output if self.stdin => {
                let device = if self.rootfs.is_some() { "/dev/vdb" } else { "/dev/vda" };
                Job::with_input(path, &self.command, device, &mut io::stdin().lock())
            }
            Console::Output => Job::create(path, Script::new().exec("</dev/null ", &self.command)),
        }
    }

    /// The VMM's process. Its log goes to a file that is shown if it fails.
    fn vmm(
        &self,
        jail: &Jail,
        console: Console,
        log: &Path,
        network: Option<&Network>,
    ) -> Result<Command, Box<dyn Error>> {
        let passed: Vec<_> = network.map(Network::fd).into_iter().collect();
        let mut command = jail.command(&passed)?;
        if let Some(network) = network {
            network.pass_to(&mut command);
        }
        command.stderr(File::options().create(true).append(true).open(log)?);
        if console == Console::Output {
            command.stdin(Stdio::null());
        }
        Ok(command)
    }

    /// The snapshot to start from, if there may be one.
    fn warm(&self, console: Console) -> Result<Option<Warm>, Box<dyn Error>> {
        let (Some(cache), Some(initramfs)) = (&self.snapshots, &self.initramfs) else { return Ok(None) };
        if self.rootfs.is_some() || self.boot_args.is_some() || self.net {
            return Ok(None);
        }
        let requests = |job: &Path| {
            let mut unjailed = Jail::none(&self.vesicle);
            self.boot(&mut unjailed, job, console, None)
        };
        let guest = Guest { vesicle: &self.vesicle, images: &[&self.kernel, initramfs], requests: &requests };
        Warm::of(&guest, cache)
    }

    /// The requests that configure and start the microVM. What it uses is brought into the jail.
    fn boot(&self, jail: &mut Jail, job: &Path, console: Console, network: Option<&Network>) -> io::Result<Vec<Put>> {
        let mut requests = Vec::new();
        let mut boot_args = BOOT_ARGS.to_owned();
        if console == Console::Terminal {
            boot_args += " vesicle.tty=1";
        }
        if let Some(network) = network {
            let interface = json!({ "iface_id": "eth0", "host_dev_name": network.host_device() });
            requests.push(("/network-interfaces/eth0", interface));
            boot_args = boot_args + " " + &network.boot_argument();
        }
        if let Some(more) = &self.boot_args {
            boot_args = boot_args + " " + more;
        }
        let mut boot_source = json!({ "kernel_image_path": jail.bring(&self.kernel, false)?, "boot_args": boot_args });
        if let Some(initramfs) = &self.initramfs {
            boot_source["initrd_path"] = json!(jail.bring(initramfs, false)?);
        }
        requests.push(("/machine-config", json!({ "vcpu_count": self.vcpus, "mem_size_mib": self.memory })));
        requests.push(("/boot-source", boot_source));
        // The guest names drives in this order: the root is vda, and the job drive comes last.
        if let Some(rootfs) = &self.rootfs {
            requests.push(("/drives/root", drive("root", &jail.bring(rootfs, self.writable)?, !self.writable)));
        }
        requests.push(("/drives/job", drive("job", &jail.give(job)?, false)));
        requests.push(("/actions", json!({ "action_type": "InstanceStart" })));
        Ok(requests)
    }
}

/// The request that makes the microVM one of those in the snapshot, with a job of its own.
fn from_snapshot(jail: &mut Jail, warm: &Warm, job: &Path) -> io::Result<Vec<Put>> {
    let load = json!({
        "snapshot_path": jail.bring(&warm.state(), false)?,
        "mem_backend": { "backend_type": "File", "backend_path": jail.bring(&warm.memory(), false)? },
        "drive_overrides": [{ "drive_id": "job", "path_on_host": jail.give(job)? }],
        "clock_realtime": true,
        "resume_vm": true,
    });
    Ok(vec![("/snapshot/load", load)])
}

fn drive(id: &str, path: &Path, read_only: bool) -> Value {
    json!({ "drive_id": id, "path_on_host": path, "is_root_device": id == "root", "is_read_only": read_only })
}

/// From now on a signal that would end this process ends the VMM instead, gently at first; the rest follows from that.
/// Returns where the signal is noted.
fn pass_on_signals(vesicle: Signaller) -> io::Result<Arc<AtomicU8>> {
    let caught = Arc::new(AtomicU8::new(0));
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let note = Arc::clone(&caught);
    std::thread::spawn(move || {
        for signal in signals.forever() {
            match note.swap(u8::try_from(signal).unwrap_or(u8::MAX), Ordering::SeqCst) {
                0 => vesicle.terminate(),
                _ => vesicle.kill(),
            }
        }
    });
    Ok(caught)
}

/// The terminal's settings, put back at the end even if the VMM was killed before it could.
struct Terminal(Option<Termios>);

impl Terminal {
    fn save() -> Self {
        Self(termios::tcgetattr(io::stdin()).ok())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.0 {
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Drain, settings);
        }
    }
}

/// The last lines of the VMM's log, on standard error.
pub fn show_tail(log: &Path) {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    for line in &lines[lines.len().saturating_sub(20)..] {
        eprintln!("{line}");
    }
}
