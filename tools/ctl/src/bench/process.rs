//! A process seen from outside: its CPU time and its memory.

use std::error::Error;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// CPU time that all threads of process `id` have used.
pub fn cpu_time(id: u32) -> io::Result<Duration> {
    let id = libc::pid_t::try_from(id).map_err(io::Error::other)?;
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both are valid for writing.
    let failed =
        unsafe { libc::clock_getcpuclockid(id, &mut clock) != 0 || libc::clock_gettime(clock, &mut time) != 0 };
    if failed {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)))
}

/// What the threads of process `id` do within 100 ms, for whoever looks for the cause of a hang.
pub fn threads(id: u32) -> String {
    let look = || -> Vec<(String, u64)> {
        let tasks = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten().map(|entry| entry.path());
        let read = |path: &Path, name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        let first = |text: String| text.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
        tasks
            .map(|path| (read(&path, "comm").trim().to_owned(), first(read(&path, "schedstat")).unwrap_or(0)))
            .collect()
    };
    let before = look();
    std::thread::sleep(Duration::from_millis(100));
    let used = |(before, after): (&(String, u64), &(String, u64))| {
        format!("thread {} runs {} ms of 100", after.0, after.1.saturating_sub(before.1) / 1_000_000)
    };
    before.iter().zip(&look()).map(used).collect::<Vec<_>>().join(", ")
}

/// Resident memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resident {
    /// Resident, except guest RAM.
    pub outside: u64,
    /// Of it, private and dirty: what another such process would need again. Counted as anonymous pages, since those of a
    /// program in a tmpfs are always dirty.
    pub dirty: u64,
    /// Guest RAM.
    pub guest: u64,
}

/// Memory of process `id`. `images` are files that may be mapped into guest RAM.
pub fn resident(id: u32, images: &[&Path]) -> Result<Resident, Box<dyn Error>> {
    Ok(parse_smaps(&fs::read_to_string(format!("/proc/{id}/smaps"))?, images))
}

/// Mappings as large as this are guest RAM.
const RAM: u64 = 8 << 20;

/// Adds up /proc/PID/smaps. Guest RAM is what is large or left out of core dumps, and the images.
fn parse_smaps(smaps: &str, images: &[&Path]) -> Resident {
    let mut total = Resident::default();
    let (mut name, mut size, mut rss, mut dirty) = ("", 0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let key = words.next().unwrap_or_default();
        let kib = || words.clone().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10;
        match key {
            "Size:" => size = kib(),
            "Rss:" => rss = kib(),
            "Anonymous:" => dirty = kib(),
            // The last line of a mapping.
            "VmFlags:" => {
                let is_image = images.iter().any(|path| path.to_str() == Some(name));
                if size >= RAM || is_image || words.any(|flag| flag == "dd") {
                    total.guest += rss;
                } else {
                    total.outside += rss;
                    total.dirty += dirty;
                }
            }
            // The first: addresses, permissions, offset, device, inode, path.
            _ if !key.ends_with(':') => {
                name = words.nth(4).unwrap_or_default();
                (size, rss, dirty) = (0, 0, 0);
            }
            _ => {}
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_from_the_rest() {
        let mapping = |range: &str, path: &str, size: u64, rss: u64, dirty: u64, flags: &str| {
            format!(
                "{range} rw-p 00000000 00:01 5 {path}\nSize: {size} kB\nRss: {rss} kB\nAnonymous: {dirty} kB\n\
                 VmFlags: rd wr {flags}\n"
            )
        };
        let smaps = [
            mapping("1000-2000", "/bin/vmm", 2000, 900, 8, "mr"),
            mapping("3000-4000", "[heap]", 100, 60, 60, "ac"),
            mapping("5000-6000", "", 131_072, 40_000, 40_000, "ac"),
            mapping("7000-8000", "/dev/shm/vmlinux", 4000, 3000, 10, "ac"),
            mapping("9000-a000", "", 4, 4, 4, "ac dd"),
        ];
        let resident = parse_smaps(&smaps.concat(), &[Path::new("/dev/shm/vmlinux")]);
        assert_eq!(resident, Resident { outside: 960 << 10, dirty: 68 << 10, guest: 43_004 << 10 });
    }

    #[test]
    fn this_process_has_used_time_and_memory() {
        let id = std::process::id();
        assert!(cpu_time(id).unwrap() > Duration::ZERO);
        assert!(resident(id, &[]).unwrap().outside > 0);
    }
}
