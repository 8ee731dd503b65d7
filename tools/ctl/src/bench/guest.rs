//! What runs in the microVMs, and the files it takes.

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::tap;

/// Memory of every guest in MiB.
pub const MEMORY_MIB: u64 = 128;
/// Bytes the flat guest dirties.
pub const FLAT_DIRTY: u64 = 32 << 20;

/// The arguments every Linux guest gets; what it shall do follows.
const BOOT_ARGS: &str = "reboot=k panic=-1 nomodule i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce pci=off \
    quiet loglevel=0";
/// Bytes of the drive.
const DRIVE: usize = 64 << 20;

/// What a Linux guest does.
#[derive(Debug, Clone, Copy)]
pub enum Job<'a> {
    /// Resets the machine at once.
    Exit,
    /// Tells the boot timer, then sleeps.
    Ready,
    /// Sends back what comes over vsock.
    Vsock,
    /// Uses all devices at once, see resources/bench/together.rs.
    Together,
    /// This many block requests of this kind, see resources/bench/init.rs.
    Block(&'a str, u32),
    /// So much of this kind over the network, see resources/bench/init.rs.
    Net(&'a str, u32),
    /// Of either, with the direction it takes limited.
    Limited(&'a str, u32, Limit),
}

impl Job<'_> {
    fn has_network(self) -> bool {
        match self {
            Job::Net(..) | Job::Together => true,
            Job::Limited(..) => !self.has_drive(),
            _ => false,
        }
    }

    fn has_drive(self) -> bool {
        match self {
            Job::Block(..) | Job::Together => true,
            Job::Limited(kind, ..) => kind.ends_with("read") || kind.ends_with("write"),
            _ => false,
        }
    }
}

/// A rate limit, a tenth of which its bucket holds.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    /// Bytes a second.
    Bandwidth(u64),
    /// Requests or frames a second.
    Operations(u64),
}

impl Limit {
    /// What it allows in a second.
    pub fn rate(self) -> u64 {
        let (Self::Bandwidth(rate) | Self::Operations(rate)) = self;
        rate
    }

    fn json(self) -> Value {
        let bucket = json!({ "size": self.rate() / 10, "refill_time": 100 });
        match self {
            Self::Bandwidth(_) => json!({ "bandwidth": bucket }),
            Self::Operations(_) => json!({ "ops": bucket }),
        }
    }
}

/// Kernel, initramfs, drive and flat guest, in memory.
#[derive(Debug)]
pub struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    /// Copies and makes them, so that no disk and no shared file system shows up in what is measured.
    pub fn prepare(kernel: &Path, initramfs: &Path) -> Result<Self, Box<dyn Error>> {
        let dir = vesiclectl::scratch::directory("vesicle-bench-", Path::new("/dev/shm"))?;
        let files = Self { dir };
        files.copy(kernel, "vmlinux")?;
        files.copy(initramfs, "initramfs")?;
        fs::write(files.path("flat"), flat(Then::Halt))?;
        fs::write(files.path("busy"), flat(Then::Again))?;
        files.write_drive()?;
        Ok(files)
    }

    /// Where `name` is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Copies `file` to `name`.
    pub fn copy(&self, file: &Path, name: &str) -> Result<PathBuf, Box<dyn Error>> {
        let path = self.path(name);
        fs::copy(file, &path).map_err(|error| format!("cannot copy {}: {error}", file.display()))?;
        Ok(path)
    }

    /// The drive holds data, not holes: those would be read faster.
    fn write_drive(&self) -> io::Result<()> {
        let mut drive = fs::File::create(self.path("drive"))?;
        let block: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for _ in 0..DRIVE / block.len() {
            drive.write_all(&block)?;
        }
        Ok(())
    }

    /// Kernel arguments for `job`.
    pub fn boot_args(job: Job<'_>) -> String {
        match job {
            Job::Exit => format!("{BOOT_ARGS} 8250.nr_uarts=0 bench=exit"),
            Job::Ready => format!("{BOOT_ARGS} 8250.nr_uarts=0 bench=ready"),
            Job::Vsock => format!("{BOOT_ARGS} 8250.nr_uarts=0 bench=vsock"),
            Job::Together => format!("{BOOT_ARGS} 8250.nr_uarts=0 bench=together"),
            Job::Block(kind, count) | Job::Net(kind, count) | Job::Limited(kind, count, _) => {
                format!("{BOOT_ARGS} 8250.nr_uarts=1 bench={kind}:{count}")
            }
        }
    }

    /// The whole configuration, by API endpoint without its slash, which are the keys of a configuration file too.
    pub fn configuration(&self, job: Job<'_>, image_mapping: Option<&str>) -> Value {
        let mut boot_source = json!({
            "kernel_image_path": self.path("vmlinux"),
            "initrd_path": self.path("initramfs"),
            "boot_args": Self::boot_args(job),
        });
        if let Some(mapping) = image_mapping {
            boot_source["image_mapping"] = json!(mapping);
        }
        let mut drives = Vec::new();
        if job.has_drive() {
            let mut drive = json!({
                "drive_id": "drive", "path_on_host": self.path("drive"), "is_root_device": false, "is_read_only": false,
            });
            if let Job::Limited(.., limit) = job {
                drive["rate_limiter"] = limit.json();
            }
            drives.push(drive);
        }
        let mut configuration = json!({ "boot-source": boot_source, "machine-config": machine(), "drives": drives });
        if matches!(job, Job::Vsock | Job::Together) {
            configuration["vsock"] = json!({ "guest_cid": 3, "uds_path": self.path("v.sock") });
        }
        if job.has_network() {
            let mut interface = json!({ "iface_id": "eth0", "host_dev_name": tap::NAME });
            if let Job::Limited(kind, _, limit) = job {
                let direction = if kind.ends_with("send") { "tx_rate_limiter" } else { "rx_rate_limiter" };
                interface[direction] = limit.json();
            }
            configuration["network-interfaces"] = json!([interface]);
        }
        configuration
    }

    /// The configuration of the flat guest.
    pub fn flat_configuration(&self) -> Value {
        self.configuration_of("flat")
    }

    /// The configuration of the flat guest that never comes to rest.
    pub fn busy_configuration(&self) -> Value {
        self.configuration_of("busy")
    }

    fn configuration_of(&self, kernel: &str) -> Value {
        json!({ "boot-source": { "kernel_image_path": self.path(kernel) }, "machine-config": machine(), "drives": [] })
    }
}

/// What a flat guest does when it has written to all its pages.
#[derive(Debug, Clone, Copy)]
enum Then {
    Halt,
    Again,
}

fn machine() -> Value {
    json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB })
}

/// A 64-bit ELF program that writes to every page of [`FLAT_DIRTY`] bytes and halts or begins again. It needs no interrupts, no devices
/// and nothing of the processor beyond its integer instructions, so that any KVM runs it.
fn flat(then: Then) -> Vec<u8> {
    const ADDRESS: u64 = 1 << 20;
    const HEADERS: u64 = 64 + 56;
    const PAGE: usize = 4096;
    let pages = u32::try_from(FLAT_DIRTY).unwrap_or(u32::MAX) / 4096;
    let mut code = vec![0xbf]; // mov edi, 64 MiB
    code.extend((64u32 << 20).to_le_bytes());
    code.push(0xb9); // mov ecx, pages
    code.extend(pages.to_le_bytes());
    code.extend([0xc6, 0x07, 0x01]); // again: mov byte [rdi], 1
    code.extend([0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00]); // add rdi, 4096
    code.extend([0xff, 0xc9, 0x75, 0xf2]); // dec ecx; jnz again
    match then {
        Then::Halt => code.extend([0xf4, 0xeb, 0xfd]), // halt: hlt; jmp halt
        Then::Again => code.extend([0xeb, 0xe6]),      // jmp to the beginning
    }

    let size = HEADERS + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2u16, 62].map(u16::to_le_bytes).concat()); // ET_EXEC, EM_X86_64
    file.extend(1u32.to_le_bytes());
    file.extend([ADDRESS + HEADERS, 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers, sections
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1u32, 7].map(u32::to_le_bytes).concat()); // PT_LOAD, RWX
    file.extend([0, ADDRESS, ADDRESS, size, size, PAGE as u64].map(u64::to_le_bytes).concat());
    file.extend(code);
    file.resize(PAGE, 0);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flat_guest_is_an_elf_file_of_one_page_that_ends_in_a_halt() {
        let file = flat(Then::Halt);
        assert_eq!((file.len(), &file[..4]), (4096, &b"\x7fELF"[..]));
        let entry = u64::from_le_bytes(file[24..32].try_into().unwrap());
        assert_eq!(entry, (1 << 20) + 120);
        let code: Vec<_> = file[120..].iter().copied().rev().skip_while(|&byte| byte == 0).collect();
        assert_eq!(code[..3], [0xfd, 0xeb, 0xf4]);
    }

    #[test]
    fn only_guests_that_print_have_a_serial_driver() {
        assert!(Files::boot_args(Job::Exit).contains("8250.nr_uarts=0"));
        let args = Files::boot_args(Job::Block("rand-read", 3));
        assert!(args.contains("8250.nr_uarts=1") && args.ends_with(" bench=rand-read:3"));
    }
}
