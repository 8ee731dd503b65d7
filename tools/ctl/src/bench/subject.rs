//! A VMM under measurement, and its processes.

use std::error::Error;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use super::process::Child;
use crate::http::Http;

/// Nothing that is measured takes so long unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Whom to measure.
#[derive(Debug, Clone)]
pub struct Subject {
    name: String,
    path: PathBuf,
    jailer: Option<PathBuf>,
    image_mapping: Option<String>,
    qemu: bool,
    confined: bool,
}

impl Subject {
    /// From NAME=PATH, NAME=PATH:MAPPING or NAME=PATH:Unconfined.
    pub fn parse(text: &str) -> Result<Self, Box<dyn Error>> {
        let (name, path) = text.split_once('=').ok_or("--vmm takes NAME=PATH")?;
        let (path, image_mapping, confined) = match path.rsplit_once(':') {
            Some((path, mapping @ ("Shared" | "Private"))) => (path, Some(mapping.to_owned()), true),
            Some((path, "Unconfined")) => (path, None, false),
            _ => (path, None, true),
        };
        let path = PathBuf::from(path);
        let jailer = Some(path.with_file_name("vesicle-jailer")).filter(|jailer| confined && jailer.exists());
        Ok(Self { name: name.to_owned(), path, jailer, image_mapping, qemu: false, confined })
    }

    /// A VMM without a name.
    pub fn new(path: &Path) -> Self {
        let path = path.to_owned();
        Self { name: String::new(), path, image_mapping: None, qemu: false, jailer: None, confined: true }
    }

    /// QEMU's microvm machine.
    pub fn qemu(path: PathBuf) -> Self {
        Self { name: "qemu".to_owned(), path, jailer: None, image_mapping: None, qemu: true, confined: true }
    }

    /// How it is called in the report.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs other files, copies of the program and its jailer, from now on.
    pub fn set_paths(&mut self, path: PathBuf, jailer: Option<PathBuf>) {
        (self.path, self.jailer) = (path, jailer);
    }

    /// The jailer that is beside the program, if there is one.
    pub fn jailer(&self) -> Option<&Path> {
        self.jailer.as_deref()
    }

    /// The `image_mapping` it is to use, if not its default.
    pub fn image_mapping(&self) -> Option<&str> {
        self.image_mapping.as_deref()
    }

    /// Whether it confines itself, if it knows how to.
    pub fn is_confined(&self) -> bool {
        self.confined
    }

    /// What it is started with besides.
    pub fn arguments(&self) -> &'static [&'static str] {
        if self.confined { &[] } else { &["--no-seccomp", "--no-landlock"] }
    }

    /// Whether it is QEMU, which has no such API.
    pub fn is_qemu(&self) -> bool {
        self.qemu
    }
}

/// A process under measurement. It is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// Its standard output and standard error.
    output: File,
}

impl Process {
    /// Starts `program` with `arguments`.
    pub fn start(program: &Path, arguments: &[&str]) -> io::Result<Self> {
        let (output, write_end) = io::pipe()?;
        let null = File::open("/dev/null")?;
        let child = Child::start(program, arguments, [null.as_fd(), write_end.as_fd(), write_end.as_fd()])?;
        Ok(Self { child, output: File::from(OwnedFd::from(output)) })
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.child.started()
    }

    /// CPU time that it has used since.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        self.child.cpu_time()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Reads its output up to and with the line that `text` is in; returns what came, and when.
    pub fn await_output(&mut self, text: &str) -> Result<(String, Instant), Box<dyn Error>> {
        let mut all = Vec::new();
        let mut buffer = [0; 4096];
        let end = Instant::now() + LIMIT;
        loop {
            let left = Timespec::try_from(end.saturating_duration_since(Instant::now()))?;
            if poll(&mut [PollFd::new(&self.output.as_fd(), PollFlags::IN)], Some(&left))? == 0 {
                return Err(format!("no {text:?} within {} s", LIMIT.as_secs()).into());
            }
            let count = self.output.read(&mut buffer)?;
            let now = Instant::now();
            all.extend_from_slice(&buffer[..count]);
            let so_far = String::from_utf8_lossy(&all);
            if so_far.split_once(text).is_some_and(|(_, rest)| rest.contains('\n')) {
                return Ok((so_far.into_owned(), now));
            }
            if count == 0 {
                return Err(format!("it ended without {text:?}; it said {so_far:?}").into());
            }
        }
    }

    /// Waits until there is something to read from `descriptor`, or its end, which is an error.
    pub fn await_input(&mut self, descriptor: BorrowedFd<'_>) -> Result<(), Box<dyn Error>> {
        let limit = Timespec::try_from(LIMIT)?;
        let mut polled = [
            PollFd::from_borrowed_fd(descriptor, PollFlags::IN),
            // Hangs up when the process has ended.
            PollFd::new(&self.output, PollFlags::empty()),
        ];
        if poll(&mut polled, Some(&limit))? == 0 {
            return Err(format!("nothing came within {} s", LIMIT.as_secs()).into());
        }
        if polled[0].revents().contains(PollFlags::IN) {
            return Ok(());
        }
        let status = self.child.wait()?;
        Err(self.failure(status))
    }

    /// Waits for its end, which must be a clean one.
    pub fn await_end(&mut self) -> Result<Instant, Box<dyn Error>> {
        let status = self.child.wait()?;
        let now = Instant::now();
        if status.success() { Ok(now) } else { Err(self.failure(status)) }
    }

    fn failure(&mut self, status: ExitStatus) -> Box<dyn Error> {
        let mut said = String::new();
        let _ = self.output.read_to_string(&mut said);
        format!("it ended with {status}: {}", said.trim_end()).into()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill();
        let _ = self.child.wait();
    }
}

/// A VMM with one open connection to its API, as launchers have it. What it answers is timed here, without an HTTP
/// library's own time in it.
#[derive(Debug)]
pub struct Api {
    /// The VMM.
    pub process: Process,
    http: Http,
}

impl Api {
    /// Starts `subject` and waits until its API answers; `pause` is what to do between two tries.
    pub fn start(subject: &Subject, socket: &Path, more: &[&str], pause: fn()) -> Result<Self, Box<dyn Error>> {
        let _ = std::fs::remove_file(socket);
        let name = socket.to_str().ok_or("the socket's path is not UTF-8")?;
        let process = Process::start(&subject.path, &[subject.arguments(), &["--api-sock", name], more].concat())?;
        Self::connect(process, socket, pause)
    }

    /// Waits until the API of `process` answers at `socket`.
    pub fn connect(mut process: Process, socket: &Path, pause: fn()) -> Result<Self, Box<dyn Error>> {
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(status) = process.child.try_wait()? {
                return Err(process.failure(status));
            }
            pause();
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let mut api = Self { process, http: Http::new(stream) };
        api.http.request("GET", "/", "")?;
        Ok(api)
    }

    /// PUTs everything a configuration file would hold.
    pub fn configure(&mut self, configuration: &Value) -> Result<(), Box<dyn Error>> {
        for endpoint in ["machine-config", "boot-source"] {
            self.must("PUT", &format!("/{endpoint}"), &configuration[endpoint])?;
        }
        for (endpoint, id) in [("drives", "drive_id"), ("network-interfaces", "iface_id")] {
            for device in configuration[endpoint].as_array().into_iter().flatten() {
                let id = device[id].as_str().ok_or("a device without an id")?;
                self.must("PUT", &format!("/{endpoint}/{id}"), device)?;
            }
        }
        if let Some(vsock) = configuration.get("vsock") {
            self.must("PUT", "/vsock", vsock)?;
        }
        Ok(())
    }

    /// As [`Http::must`].
    pub fn must(&mut self, method: &str, path: &str, body: &Value) -> Result<Duration, Box<dyn Error>> {
        self.http.must(method, path, body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_may_name_its_image_mapping_or_go_unconfined() {
        let subject = Subject::parse("a=/x/y:Private").unwrap();
        assert_eq!(
            (subject.name(), subject.path(), subject.image_mapping()),
            ("a", Path::new("/x/y"), Some("Private"))
        );
        let subject = Subject::parse("b=/x:y").unwrap();
        assert_eq!((subject.path(), subject.image_mapping()), (Path::new("/x:y"), None));
        let subject = Subject::parse("c=/x/y:Unconfined").unwrap();
        assert_eq!((subject.path(), subject.arguments().len()), (Path::new("/x/y"), 2));
        assert!(Subject::parse("/x").is_err());
    }

    #[test]
    fn output_is_awaited_and_an_end_without_it_is_an_error() {
        let mut process = Process::start(Path::new("/bin/sh"), &["-c", "echo one; echo two >&2"]).unwrap();
        assert!(process.await_output("two").unwrap().0.starts_with("one\n"));
        process.await_end().unwrap();
        let mut process = Process::start(Path::new("/bin/sh"), &["-c", "echo no; exit 3"]).unwrap();
        assert!(process.await_output("yes").unwrap_err().to_string().contains("no"));
        assert!(process.await_end().is_err());
    }

    #[test]
    fn whoever_waits_for_a_process_that_ends_learns_why() {
        let (near, _far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let mut process = Process::start(Path::new("/bin/sh"), &["-c", "echo no guest; exit 3"]).unwrap();
        let failure = process.await_input(near.as_fd()).unwrap_err().to_string();
        assert!(failure.contains("3: no guest"), "{failure}");
    }

    #[test]
    fn what_comes_is_not_waited_for_any_longer() {
        let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        far.send(b"ready").unwrap();
        let mut process = Process::start(Path::new("/bin/sh"), &["-c", "echo; sleep 60"]).unwrap();
        process.await_input(near.as_fd()).unwrap();
    }
}
