//! A launcher on a published client of the API: it starts the VMM, configures, starts, pauses, saves, loads and ends a
//! guest, and talks to it over vsock meanwhile. It exits with status 0 if all of it went well.
//!
//! `published VMM DIR KERNEL INITRAMFS TOOL JOB`: the job drive's job listens on vsock port 5000, sends back what
//! comes, and connects to port 1234 of the host to say that it does.

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::models::{
    BackendType, BootSource, Drive, InstanceState, LogLevel, Logger, MachineConfiguration, MemoryBackend, Metrics,
    SnapshotCreateParams, SnapshotLoadParams, SnapshotType, Vsock,
};

type Outcome = Result<(), Box<dyn Error>>;

const PATIENCE: Duration = Duration::from_secs(120);
const BOOT_ARGS: &str = "console=ttyS0 quiet loglevel=1 reboot=k panic=-1 swiotlb=noforce";

/// The files of a guest.
struct Files {
    vmm: PathBuf,
    dir: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    drives: [(&'static str, PathBuf); 2],
}

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A VMM that has nothing to do yet.
    fn launch(&self, id: &str) -> Result<Instance, Box<dyn Error>> {
        let serial = self.path(&format!("serial-{id}"));
        let mut option = FirecrackerOption::new(&self.vmm);
        option.api_sock(self.path(&format!("{id}.sock"))).id(id).level("Info");
        let mut instance = option.stdin("/dev/null").stdout(&serial).stderr(&serial).build()?;
        instance.start_vmm()?;
        let described = instance.describe_instance()?;
        assert_eq!((described.id.as_str(), described.state), (id, InstanceState::NotStarted));
        Ok(instance)
    }

    fn configure(&self, vmm: &mut Instance) -> Outcome {
        let version = vmm.get_firecracker_version()?.firecracker_version;
        assert!(version.starts_with("1."), "{version}");
        vmm.put_logger(&Logger {
            level: Some(LogLevel::Debug),
            log_path: self.path("log"),
            show_level: Some(true),
            show_log_origin: None,
            module: None,
        })?;
        vmm.put_metrics(&Metrics { metrics_path: self.path("metrics") })?;
        vmm.put_machine_configuration(&MachineConfiguration {
            cpu_template: None,
            smt: Some(false),
            mem_size_mib: 64,
            track_dirty_pages: None,
            vcpu_count: 1,
            huge_pages: None,
        })?;
        assert_eq!(vmm.get_machine_configuration()?.mem_size_mib, 64);
        let missing = self.path("missing");
        let refused = vmm.put_guest_boot_source(&self.boot_source(&missing));
        assert!(refused.is_err(), "a kernel that is not there");
        vmm.put_guest_boot_source(&self.boot_source(&self.kernel))?;
        for (id, path) in &self.drives {
            vmm.put_guest_drive_by_id(&drive(id, path))?;
        }
        let vsock = Vsock { guest_cid: 3, uds_path: self.path("v.sock"), vsock_id: Some("vsock0".into()) };
        vmm.put_guest_vsock(&vsock)?;
        Ok(())
    }

    fn boot_source(&self, kernel: &Path) -> BootSource {
        BootSource {
            boot_args: Some(BOOT_ARGS.into()),
            initrd_path: Some(self.initramfs.clone()),
            kernel_image_path: kernel.to_owned(),
        }
    }

    /// A connection to the guest.
    fn connect(&self) -> Result<UnixStream, Box<dyn Error>> {
        let mut stream = UnixStream::connect(self.path("v.sock"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"CONNECT 5000\n")?;
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            answer.extend(byte);
        }
        assert!(answer.starts_with(b"OK "), "{answer:?}");
        Ok(stream)
    }
}

fn drive(id: &str, path: &Path) -> Drive {
    Drive {
        drive_id: id.into(),
        partuuid: None,
        is_root_device: false,
        cache_type: None,
        is_read_only: id == "tool",
        path_on_host: path.to_owned(),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    }
}

fn echo(stream: &mut UnixStream, text: &[u8]) -> Outcome {
    stream.write_all(text)?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, text);
    Ok(())
}

/// Waits until a VMM has ended, which removes its socket.
fn await_end(socket: &Path) {
    let end = Instant::now() + PATIENCE;
    while socket.exists() {
        assert!(Instant::now() < end, "{} is still there", socket.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn main() -> Outcome {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [vmm, dir, kernel, initramfs, tool, job] = arguments.try_into().map_err(|_| "six arguments, please")?;
    let files = Files { vmm, dir, kernel, initramfs, drives: [("tool", tool), ("job", job)] };
    let told = UnixListener::bind(files.path("v.sock_1234"))?;

    let mut first = files.launch("first")?;
    files.configure(&mut first)?;
    first.start()?;
    assert_eq!(first.describe_instance()?.state, InstanceState::Running);
    assert!(first.start().is_err(), "it runs already");
    told.accept()?;
    let mut stream = files.connect()?;
    echo(&mut stream, b"running")?;

    first.pause()?;
    assert_eq!(first.describe_instance()?.state, InstanceState::Paused);
    first.resume()?;
    echo(&mut stream, b"resumed")?;
    drop(stream);

    first.pause()?;
    first.create_snapshot(&SnapshotCreateParams {
        mem_file_path: files.path("memory"),
        snapshot_path: files.path("state"),
        snapshot_type: Some(SnapshotType::Full),
        version: None,
    })?;
    // Its process gets SIGTERM.
    drop(first);
    await_end(&files.path("v.sock"));

    let mut second = files.launch("second")?;
    second.load_snapshot(&SnapshotLoadParams {
        enable_diff_snapshots: Some(false),
        mem_file_path: None,
        mem_backend: Some(MemoryBackend { backend_type: BackendType::File, backend_path: files.path("memory") }),
        resume_vm: Some(true),
        snapshot_path: files.path("state"),
    })?;
    assert_eq!(second.describe_instance()?.state, InstanceState::Running);
    echo(&mut files.connect()?, b"loaded")?;
    second.stop()?;
    await_end(&files.path("second.sock"));

    for file in ["log", "metrics"] {
        assert!(files.path(file).metadata()?.len() > 0, "{file} is empty");
    }
    Ok(())
}
