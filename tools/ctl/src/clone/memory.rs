//! What clones cost in memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Memory of a process in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// What is shared counted by halves, thirds and so on (proportional set size).
    pub proportional: u64,
    /// Anonymous pages: what no other process shares, and another clone would need again.
    pub own: u64,
}

impl Memory {
    /// Of process `id`, guest RAM included.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(id: u32) -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string(format!("/proc/{id}/smaps_rollup"))?))
    }

    fn parse(rollup: &str) -> Self {
        let kib = |key: &str| {
            let value = rollup.lines().find_map(|line| line.strip_prefix(key)?.split_ascii_whitespace().next());
            value.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0) << 10
        };
        Self { proportional: kib("Pss:"), own: kib("Anonymous:") }
    }
}

/// A control group for the clones, which counts what the kernel needs for them as well.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// A new one; `None` where the memory controller is not ours to use.
    pub fn new() -> Option<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let group = Self(root.join(format!("vesiclectl-{}", std::process::id())));
        vesiclectl::scratch::control_group(&group.0).ok()?;
        let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
        group.current().map(|_| group)
    }

    /// Puts process `id` into it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn add(&self, id: u32) -> io::Result<()> {
        fs::write(self.0.join("cgroup.procs"), id.to_string())
    }

    /// Bytes charged to it.
    pub fn current(&self) -> Option<u64> {
        fs::read_to_string(self.0.join("memory.current")).ok()?.trim().parse().ok()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // It goes once its last process has.
        let _ = fs::remove_dir(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollup_is_added_up_in_bytes() {
        let rollup =
            "1000-2000 ---p 00000000 00:00 0 [rollup]\nRss: 9 kB\nPss: 12 kB\nPss_Anon: 7 kB\nAnonymous: 8 kB\n";
        assert_eq!(Memory::parse(rollup), Memory { proportional: 12 << 10, own: 8 << 10 });
    }

    #[test]
    fn this_process_has_memory_of_its_own() {
        let memory = Memory::of(std::process::id()).unwrap();
        assert!(memory.own > 0 && memory.proportional >= memory.own / 2, "{memory:?}");
    }
}
