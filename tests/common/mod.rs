//! The harness: describe a guest, boot it, talk to it.
//!
//! ```ignore
//! let mut vm = Guest::debian("6.12").vcpus(2).boot();
//! assert_eq!(vm.ok("nproc"), "2");
//! vm.shut_down();
//! ```
//!
//! The guests' paths come from the environment: `tools/test` prepares them and sets it.

// Each test file uses its own part of this.
#![allow(dead_code)]

mod jail;
pub mod rest;
pub mod snapshot;
pub mod tap;

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
pub use vesiclectl::BOOT_ARGS;
use vesiclectl::{Client, Job, Script, Vesicle};

#[allow(unused_imports)]
pub use jail::{JAILER, Mode, Place};

/// Where KVM itself is emulated a guest takes seconds to boot, and longer beside others.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// The job of a guest that is told what to do as it goes: it runs the lines it is sent, one after the other. A record
/// separator and the exit status end a command's output.
const SHELL: &str = r#"printf '\036ready\n'
while IFS= read -r line; do (eval "$line") </dev/null; printf '\036%d\n' $?; done
"#;

/// A directory for files that a VMM uses, jailed or not.
pub fn tempdir() -> Place {
    Place::new(Mode::chosen())
}

/// The path of a guest artefact that `tools/test` prepared, by the name `tools/guest` gives it.
pub fn artefact(name: &str) -> PathBuf {
    let variable = format!("VESICLE_GUEST_{}", name.to_uppercase().replace(['-', '.'], "_"));
    let path = std::env::var_os(&variable);
    path.unwrap_or_else(|| panic!("{variable} is not set; ./tools/test sets it to what ./tools/guest {name} prints"))
        .into()
}

/// Whether this Debian has a kernel 6.1: Debian 13 has none, and `tools/test` says so by an empty path.
pub fn has_debian_6_1() -> bool {
    let has = !artefact("kernel-6.1").as_os_str().is_empty();
    if !has {
        eprintln!("SKIPPED: Debian's kernel 6.1");
    }
    has
}

/// A guest to be.
#[derive(Debug)]
pub struct Guest {
    dir: Place,
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    boot_args: String,
    vcpus: u8,
    memory: u64,
    drives: Vec<Value>,
    interfaces: Vec<Value>,
    job: Option<Script>,
    arguments: Vec<String>,
    passed: Vec<Arc<OwnedFd>>,
    unprivileged: bool,
}

impl Guest {
    fn new(kernel: PathBuf, initramfs: PathBuf, memory: u64) -> Self {
        Self {
            dir: Place::new(Mode::chosen()),
            kernel,
            initramfs: Some(initramfs),
            boot_args: BOOT_ARGS.to_owned(),
            vcpus: 1,
            memory,
            drives: Vec::new(),
            interfaces: Vec::new(),
            job: Some(SHELL.into()),
            arguments: Vec::new(),
            passed: Vec::new(),
            unprivileged: false,
        }
    }

    /// Debian's cloud kernel of a series, such as `6.12`, with 256 MiB and the default guest in its initramfs.
    pub fn debian(series: &str) -> Self {
        Self::new(artefact(&format!("kernel-{series}")), artefact(&format!("initramfs-{series}")), 256)
    }

    /// The tuned kernel, and each of Debian's that there is.
    pub fn of_each_kernel() -> impl Iterator<Item = Self> {
        let guests = [Self::tuned(), Self::debian("6.12")].into_iter();
        guests.chain(has_debian_6_1().then(|| Self::debian("6.1")))
    }

    /// The tuned kernel, with 64 MiB and the default guest in its initramfs.
    pub fn tuned() -> Self {
        Self::new(artefact("kernel-tuned"), artefact("initramfs-tuned"), 64)
    }

    /// Runs the VMM so, whatever the environment asks for. Comes first.
    pub fn mode(self, mode: Mode) -> Self {
        Self { dir: Place::new(mode), ..self }
    }

    /// Boots this file instead.
    pub fn kernel(self, kernel: impl Into<PathBuf>) -> Self {
        Self { kernel: kernel.into(), ..self }
    }

    /// This many vCPUs instead of one.
    pub fn vcpus(self, vcpus: u8) -> Self {
        Self { vcpus, ..self }
    }

    /// Memory in MiB.
    pub fn memory(self, memory: u64) -> Self {
        Self { memory, ..self }
    }

    /// Further kernel arguments.
    pub fn boot_args(mut self, more: &str) -> Self {
        self.boot_args = format!("{} {more}", self.boot_args);
        self
    }

    /// Without initramfs: the kernel mounts the root by itself.
    pub fn no_initramfs(self) -> Self {
        Self { initramfs: None, ..self }
    }

    /// A copy of the default guest's root file system is the root drive.
    pub fn rootfs(self) -> Self {
        self.root_from("rootfs")
    }

    /// A copy of this artefact is the root drive.
    pub fn root_from(mut self, name: &str) -> Self {
        let copy = self.dir.path().join("rootfs.ext4");
        fs::copy(artefact(name), &copy).unwrap();
        let root = json!({ "drive_id": "root", "is_root_device": true, "path_on_host": copy });
        self.drives.insert(0, root);
        self
    }

    /// A further drive: the body of PUT /drives, save `is_root_device`. The guest sees drives in the order given here,
    /// after the root drive if there is one.
    pub fn drive(mut self, id: &str, image: &Path, mut more: Value) -> Self {
        more["drive_id"] = json!(id);
        more["path_on_host"] = json!(image);
        more["is_root_device"] = json!(false);
        self.drives.push(more);
        self
    }

    /// A network interface: the body of PUT /network-interfaces. The guest calls the first eth0.
    pub fn interface(self, id: &str, host_dev_name: &str, mut more: Value) -> Self {
        let (mut guest, host_dev_name) = self.reach(host_dev_name);
        more["iface_id"] = json!(id);
        more["host_dev_name"] = json!(host_dev_name);
        guest.interfaces.push(more);
        guest
    }

    /// Sees to it that the VMM can open a TAP, and returns the `host_dev_name` by which it can.
    pub fn reach(self, host_dev_name: &str) -> (Self, String) {
        if self.dir.mode() != Mode::Rootless || host_dev_name.starts_with("fd:") {
            return (self, host_dev_name.to_owned());
        }
        // Nobody could open it in a jail that root had no part in.
        let tap = vesicle::devices::virtio::net::Tap::open(host_dev_name).unwrap();
        let fd = tap.as_fd().try_clone_to_owned().unwrap();
        let name = format!("fd:{}", fd.as_raw_fd());
        (self.pass(fd), name)
    }

    /// Runs this shell script and resets the machine, instead of waiting for commands.
    pub fn job(self, script: &str) -> Self {
        Self { job: Some(script.into()), ..self }
    }

    /// No job drive at all.
    pub fn no_job(self) -> Self {
        Self { job: None, ..self }
    }

    /// A further argument of the VMM.
    pub fn argument(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Passes a descriptor to the VMM, which knows it by the number it has here.
    pub fn pass(mut self, fd: OwnedFd) -> Self {
        self.passed.push(Arc::new(fd));
        self
    }

    /// Runs the VMM as a user who may do nothing, with copies of the images, whatever the environment asks for.
    pub fn unprivileged(mut self) -> Self {
        self = self.mode(Mode::Plain);
        let copy = |file: &Path, name: &str| {
            let copy = self.dir.path().join(name);
            fs::copy(file, &copy).unwrap();
            fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
            copy
        };
        copy(Path::new(env!("CARGO_BIN_EXE_vesicle")), "vesicle");
        self.kernel = copy(&self.kernel, "kernel");
        self.initramfs = self.initramfs.as_ref().map(|initramfs| copy(initramfs, "initramfs"));
        fs::set_permissions(self.dir.path(), Permissions::from_mode(0o755)).unwrap();
        Self { unprivileged: true, ..self }
    }

    fn command(&self) -> Command {
        const NOBODY: u32 = 65534;
        let passed: Vec<_> = self.passed.iter().map(|fd| fd.as_raw_fd()).collect();
        let mut command = self.dir.command(&passed);
        if self.unprivileged {
            let arguments: Vec<_> = command.get_args().map(OsStr::to_owned).collect();
            command = Command::new(self.dir.path().join("vesicle"));
            command.args(arguments).uid(NOBODY).gid(NOBODY);
        }
        let inherit = move || {
            for fd in &passed {
                // SAFETY: the descriptor is open; this changes a flag of the child's copy.
                if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: between fork and exec the closure only makes system calls.
        unsafe { command.pre_exec(inherit) };
        command
    }

    /// The VMM's process, with nothing configured.
    pub fn launch(self) -> MicroVm {
        let log = self.dir.path().join("log");
        let images = self.drives.iter().filter_map(|drive| drive["path_on_host"].as_str()).map(Path::new);
        for file in images.chain(Some(self.kernel.as_path())).chain(self.initramfs.as_deref()) {
            self.dir.bring(file);
        }
        let mut command = self.command();
        command.args(&self.arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(File::options().create(true).append(true).open(&log).unwrap());
        let mut vesicle = self.dir.spawn(command);
        let serial = Serial::collect(vesicle.child().stdout.take().unwrap());
        let job = self.job.as_ref().map(|script| Job::create(self.dir.path().join("job"), script.clone()).unwrap());
        if let Some(job) = job.as_ref().filter(|_| self.unprivileged) {
            fs::set_permissions(job.path(), Permissions::from_mode(0o666)).unwrap();
        }
        MicroVm { vesicle, serial, seen: 0, job, log, guest: self, before: None }
    }

    /// Everything configured, not started.
    pub fn configure(self) -> MicroVm {
        let vm = self.launch();
        vm.put("/machine-config", &vm.guest.machine_config());
        vm.put("/boot-source", &vm.guest.boot_source());
        for drive in vm.drives() {
            vm.put(&format!("/drives/{}", drive["drive_id"].as_str().unwrap()), &drive);
        }
        for interface in &vm.guest.interfaces {
            vm.put(&format!("/network-interfaces/{}", interface["iface_id"].as_str().unwrap()), interface);
        }
        vm
    }

    /// Started, and left to itself.
    pub fn start(self) -> MicroVm {
        let vm = self.configure();
        vm.start();
        vm
    }

    /// Started, and ready for commands.
    pub fn boot(self) -> MicroVm {
        let mut vm = self.start();
        vm.wait_until_ready();
        vm
    }

    /// The `host_dev_name` of an interface: a descriptor's where the VMM cannot open the one that was asked for.
    pub fn interface_name(&self, id: &str) -> &Value {
        &self.interfaces.iter().find(|interface| interface["iface_id"] == id).unwrap()["host_dev_name"]
    }

    /// The body of PUT /machine-config.
    pub fn machine_config(&self) -> Value {
        json!({ "vcpu_count": self.vcpus, "mem_size_mib": self.memory })
    }

    /// The body of PUT /boot-source.
    pub fn boot_source(&self) -> Value {
        let mut body = json!({ "kernel_image_path": self.kernel, "boot_args": self.boot_args });
        if let Some(initramfs) = &self.initramfs {
            body["initrd_path"] = json!(initramfs);
        }
        body
    }
}

/// A VMM's process and the microVM in it. It is killed when this is dropped; if the test has failed, what it said is
/// shown.
#[derive(Debug)]
pub struct MicroVm {
    vesicle: Vesicle,
    serial: Arc<Serial>,
    /// How much of the serial output belongs to commands that are over.
    seen: usize,
    job: Option<Job>,
    log: PathBuf,
    guest: Guest,
    /// Whose guest this is, with the files it lives on.
    before: Option<Box<MicroVm>>,
}

impl MicroVm {
    /// The bodies of PUT /drives, in order: the job drive is last.
    pub fn drives(&self) -> Vec<Value> {
        let job = self
            .job
            .iter()
            .map(|job| json!({ "drive_id": "job", "is_root_device": false, "path_on_host": job.path() }));
        self.guest.drives.iter().cloned().chain(job).collect()
    }

    /// A directory that lives as long as this.
    pub fn dir(&self) -> &Path {
        self.guest.dir.path()
    }

    /// What was described.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The API.
    pub fn api(&self) -> &Client {
        self.vesicle.api()
    }

    /// The process id.
    pub fn pid(&mut self) -> u32 {
        self.vesicle.child().id()
    }

    /// PUT, which must succeed.
    pub fn put(&self, path: &str, body: &Value) {
        let reply = self.api().put(path, body).unwrap();
        assert_eq!(reply.status, 204, "PUT {path} {body}: {}", reply.body);
    }

    /// PATCH, which must succeed.
    pub fn patch(&self, path: &str, body: &Value) {
        let reply = self.api().patch(path, body).unwrap();
        assert_eq!(reply.status, 204, "PATCH {path} {body}: {}", reply.body);
    }

    /// GET, which must succeed.
    pub fn get(&self, path: &str) -> Value {
        let reply = self.api().get(path).unwrap();
        assert_eq!(reply.status, 200, "GET {path}: {}", reply.body);
        reply.json()
    }

    /// The total of a metric, by its OpenMetrics name up to and with the labels.
    pub fn metric(&self, name: &str) -> u64 {
        let text = self.api().get("/metrics").unwrap().body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    /// PUT, which must be refused; returns the fault message.
    pub fn refused_put(&self, path: &str, body: &Value) -> String {
        let reply = self.api().put(path, body).unwrap();
        assert_eq!(reply.status, 400, "PUT {path} {body}: {}", reply.body);
        reply.fault()
    }

    /// InstanceStart.
    pub fn start(&self) {
        self.action("InstanceStart");
    }

    /// PUT /actions.
    pub fn action(&self, action: &str) {
        self.put("/actions", &json!({ "action_type": action }));
    }

    /// Pauses the microVM.
    pub fn pause(&self) {
        self.patch("/vm", &json!({ "state": "Paused" }));
    }

    /// Resumes it.
    pub fn resume(&self) {
        self.patch("/vm", &json!({ "state": "Resumed" }));
    }

    /// Waits until the guest takes commands.
    pub fn wait_until_ready(&mut self) {
        self.seen = self.serial.wait_for("the guest's shell", PATIENCE, |text| end_of(text, 0, "\u{1e}ready\n"));
    }

    /// Waits for a whole line of serial output that contains `text`, and returns it.
    pub fn wait_for_line(&self, text: &str, timeout: Duration) -> String {
        self.serial.wait_for(&format!("a line with {text:?}"), timeout, |output| {
            let whole = &output[..output.rfind('\n').map_or(0, |end| end + 1)];
            whole.lines().find(|line| line.contains(text)).map(str::to_owned)
        })
    }

    /// Waits until something in the serial output since the last command contains `text`.
    pub fn wait_for(&self, text: &str) {
        self.serial.wait_for(&format!("{text:?}"), PATIENCE, |output| end_of(output, self.seen, text));
    }

    /// Everything the guest has written to its serial port.
    pub fn output(&self) -> String {
        self.serial.lock().text.clone()
    }

    /// Sends one line of shell without waiting for its end; [`MicroVm::finish`] does.
    pub fn begin(&mut self, command: &str) {
        assert!(!command.contains('\n') && command.len() < 4000, "one line, please: {command}");
        let input = self.vesicle.child().stdin.as_mut().unwrap();
        writeln!(input, "{command}").unwrap();
    }

    /// The output and the exit status of the command that was begun.
    pub fn finish(&mut self, timeout: Duration) -> (String, i32) {
        let seen = self.seen;
        let (output, status, end) = self.serial.wait_for("the end of a command", timeout, |text| {
            let (output, rest) = text[seen..].split_once('\u{1e}')?;
            let (status, _) = rest.split_once('\n')?;
            Some((output.to_owned(), status.parse().unwrap(), seen + output.len() + status.len() + 2))
        });
        self.seen = end;
        (output, status)
    }

    /// Runs one line of shell; returns its output and exit status.
    pub fn run(&mut self, command: &str) -> (String, i32) {
        self.begin(command);
        self.finish(PATIENCE)
    }

    /// Runs one line of shell, which must succeed; returns its output without the last newline.
    pub fn ok(&mut self, command: &str) -> String {
        let (output, status) = self.run(command);
        assert_eq!(status, 0, "{command}: {output}");
        output.trim_end_matches('\n').to_owned()
    }

    /// Waits for the VMM's end.
    pub fn wait_exit(&mut self) -> ExitStatus {
        self.vesicle.wait_timeout(PATIENCE).unwrap().expect("the VMM should have ended by now")
    }

    /// Another VMM with nothing configured, for the same guest: its files and job are this one's, and commands go on
    /// where they were. This one must have ended.
    pub fn successor(self) -> Self {
        self.successor_with(&[])
    }

    /// The same, started with further arguments.
    pub fn successor_with(mut self, arguments: &[&str]) -> Self {
        let mut vm = self.sibling(arguments);
        vm.job = self.job.take();
        vm.before = Some(Box::new(self));
        vm
    }

    /// One of many such successors. This one is to outlive them: their files are its.
    pub fn sibling(&self, arguments: &[&str]) -> Self {
        let guest = Guest {
            dir: Place::new(self.guest.dir.mode()),
            job: None,
            kernel: self.guest.kernel.clone(),
            initramfs: self.guest.initramfs.clone(),
            boot_args: self.guest.boot_args.clone(),
            drives: self.guest.drives.clone(),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            interfaces: self.guest.interfaces.clone(),
            passed: self.guest.passed.clone(),
            ..self.guest
        };
        guest.launch()
    }

    /// Waits for the VMM's end and takes the exit status of the job.
    pub fn wait_job(&mut self) -> Option<u8> {
        assert!(self.wait_exit().success());
        self.job.as_ref().unwrap().status().unwrap()
    }

    /// Has the guest reset the machine, which must end the VMM with status 0.
    pub fn shut_down(mut self) {
        self.begin("sync; reboot -f");
        assert_eq!(self.wait_exit().code(), Some(0));
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.vesicle.signaller().terminate();
    }

    /// SIGINT.
    pub fn interrupt(&self) {
        self.vesicle.signaller().interrupt();
    }

    /// Ends the process as if the host had crashed under it, and waits until it is gone.
    pub fn kill(&mut self) {
        self.vesicle.signaller().kill();
        self.wait_exit();
    }

    /// The VMM's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for MicroVm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the guest's serial output\n{}\n--- the VMM's log\n{}---", self.output(), self.log());
        }
    }
}

/// Waits until something is so.
pub fn wait_until(mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "time was up");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The end of the first `needle` in `text` from `start` on.
fn end_of(text: &str, start: usize, needle: &str) -> Option<usize> {
    text[start..].find(needle).map(|at| start + at + needle.len())
}

/// What came out of a serial port, collected by a thread.
#[derive(Debug, Default)]
struct Serial {
    collected: Mutex<Collected>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Collected {
    text: String,
    ended: bool,
}

impl Serial {
    fn collect(mut from: impl Read + Send + 'static) -> Arc<Self> {
        let serial = Arc::new(Self::default());
        let ours = Arc::clone(&serial);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = from.read(&mut buffer).unwrap_or(0);
                let mut collected = ours.lock();
                // Guests of the tests write ASCII; anything else is shown as well as it goes.
                collected.text.push_str(&String::from_utf8_lossy(&buffer[..count]));
                collected.ended = count == 0;
                ours.changed.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        serial
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.collected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `find` finds something in the output.
    fn wait_for<T>(&self, what: &str, timeout: Duration, find: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + timeout;
        let mut collected = self.lock();
        loop {
            if let Some(found) = find(&collected.text) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let why = if collected.ended { "the VMM ended" } else { "time was up" };
            if collected.ended || left.is_zero() {
                drop(collected);
                panic!("waited for {what}, but {why}");
            }
            collected = self.changed.wait_timeout(collected, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
