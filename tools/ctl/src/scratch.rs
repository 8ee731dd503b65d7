//! Directories for as long as this process lives, even if a signal ends it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use tempfile::TempDir;

/// Those there may be. Whoever removes them because of a signal does not let go of them.
static DIRECTORIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A new directory in `parent`, which goes when it is dropped.
///
/// # Errors
/// It cannot be made.
pub fn directory(prefix: &str, parent: &Path) -> io::Result<TempDir> {
    let mut directories = directories();
    let made = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?;
    directories.push(made.path().to_owned());
    Ok(made)
}

/// A new control group, which its maker removes.
///
/// # Errors
/// It cannot be made.
pub fn control_group(path: &Path) -> io::Result<()> {
    let mut directories = directories();
    fs::create_dir(path)?;
    directories.push(path.to_owned());
    Ok(())
}

/// From now on a signal that would end this process first removes them; until the handle is closed.
///
/// # Errors
/// The system refuses.
pub fn remove_on_signals() -> io::Result<Handle> {
    let ignored = ignored();
    let mut signals =
        Signals::new([SIGHUP, SIGINT, SIGTERM].iter().filter(|signal| ignored >> (**signal - 1) & 1 == 0))?;
    let handle = signals.handle();
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let directories = directories();
            directories.iter().for_each(|directory| remove(directory));
            std::process::exit(128 + signal);
        }
    });
    Ok(handle)
}

/// Waits for the end, if a signal is ending this process: what failed meanwhile did so because of it.
pub fn settle() {
    drop(directories());
}

fn directories() -> MutexGuard<'static, Vec<PathBuf>> {
    DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The signals that whoever started this process wants ignored, as nohup does, by their numbers less one.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Until it is gone: other threads and processes may still write to it, and a control group stays as long as its last
/// process.
fn remove(directory: &Path) {
    for _ in 0..100 {
        if let Ok(mut kill) = File::options().write(true).open(directory.join("cgroup.kill")) {
            let _ = kill.write_all(b"1");
            let _ = fs::remove_dir(directory);
        } else {
            let _ = fs::remove_dir_all(directory);
        }
        if !directory.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
