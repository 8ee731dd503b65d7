//! Snapshots of guests that have booted and wait for a job: a run starts from one instead of booting.

use std::error::Error;
use std::fs::{self, File, Permissions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use vesiclectl::{Job, Vesicle, scratch};

use crate::run::show_tail;

/// A PUT request: path and body.
pub type Put = (&'static str, Value);

/// Snapshots that are kept, for guests of different sizes and for other versions of what they are made from.
const KEPT: usize = 4;

/// How the names of those begin that are not made yet, or not removed yet.
const NEW: &str = "new-";
/// The age at which nobody is at it any more.
const ABANDONED: Duration = Duration::from_secs(3600);

/// A guest that is configured and booted by requests, but for the path of its job drive.
pub struct Guest<'a> {
    /// The VMM.
    pub vesicle: &'a Path,
    /// The files that it boots from.
    pub images: &'a [&'a Path],
    /// The requests, in order.
    pub requests: &'a dyn Fn(&Path) -> io::Result<Vec<Put>>,
}

/// The snapshot of a guest.
pub struct Warm(PathBuf);

impl Warm {
    /// That of `guest` in the directory `cache`. If there is none yet, the guest is booted for it; `None` if it cannot be
    /// kept, which is said.
    ///
    /// # Errors
    /// The guest cannot be booted.
    pub fn of(guest: &Guest, cache: &Path) -> Result<Option<Self>, Box<dyn Error>> {
        let warm = Self(cache.join(guest.key()?));
        if warm.state().is_file() && warm.memory().is_file() {
            return Ok(Some(warm));
        }
        // Whoever tidies up caches may have left a part, which would be in the way.
        let _ = discard(&warm.0);
        let not_kept = |error: Box<dyn Error>| {
            eprintln!("vesiclectl: no snapshot of the guest is kept in {}: {error}", cache.display());
            Ok(None)
        };
        let new = match directory_in(cache) {
            Ok(new) => new,
            Err(error) => return not_kept(error.into()),
        };
        eprintln!("vesiclectl: booting the guest once; this run and later ones start from a snapshot of it");
        let vmm = guest.boot(new.path())?;
        if let Err(error) = save(&vmm, new.path()).and_then(|()| warm.publish(new)) {
            return not_kept(error);
        }
        prune(cache);
        Ok(Some(warm))
    }

    fn publish(&self, new: TempDir) -> Result<(), Box<dyn Error>> {
        match fs::rename(new.path(), &self.0) {
            Ok(()) => drop(new.keep()),
            // Another run was faster.
            Err(_) if self.0.is_dir() => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Its state file.
    pub fn state(&self) -> PathBuf {
        state(&self.0)
    }

    /// Its memory file.
    pub fn memory(&self) -> PathBuf {
        memory(&self.0)
    }

    /// Removes it.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn discard(self) -> io::Result<()> {
        discard(&self.0)
    }
}

fn state(dir: &Path) -> PathBuf {
    dir.join("state")
}

fn memory(dir: &Path) -> PathBuf {
    dir.join("memory")
}

impl Guest<'_> {
    /// A name that is another one whenever the snapshot would be, and on every kind of host.
    fn key(&self) -> io::Result<String> {
        let mut hash = Sha256::new();
        for (path, body) in (self.requests)(Path::new("job"))? {
            hash.update(path);
            hash.update(body.to_string());
        }
        for file in self.images.iter().chain([&self.vesicle]) {
            let file = file.canonicalize()?;
            let found = fs::metadata(&file)?;
            hash.update(file.as_os_str().as_bytes());
            for number in [found.size().cast_signed(), found.mtime(), found.mtime_nsec()] {
                hash.update(number.to_le_bytes());
            }
        }
        hash.update(fs::read("/proc/sys/kernel/osrelease")?);
        // The first processor's: to tell of all takes a large host long.
        for line in BufReader::new(File::open("/proc/cpuinfo")?).lines() {
            let line = line?;
            if line.is_empty() {
                break;
            }
            if line.starts_with("model name") || line.starts_with("flags") {
                hash.update(line);
            }
        }
        Ok(hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Boots it until it waits for a job. What it writes meanwhile is in `dir`.
    fn boot(&self, dir: &Path) -> Result<Vesicle, Box<dyn Error>> {
        let (job, log) = (dir.join("job"), dir.join("log"));
        Job::none(&job)?;
        let mut command = Command::new(self.vesicle);
        for path in self.images.iter().chain([&dir]) {
            command.arg("--allow-path").arg(path);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&log)?);
        let mut vmm = Vesicle::spawn(command).map_err(|error| format!("{}: {error}", self.vesicle.display()))?;
        for (path, body) in (self.requests)(&job)? {
            vmm.api().must_put(path, &body)?;
        }
        let mut console = vmm.child().stdout.take().ok_or("the VMM has no standard output")?;
        let mut byte = [0];
        while byte[0] != Job::WAITS {
            if console.read(&mut byte)? == 0 {
                show_tail(&log);
                return Err("the guest ended before it waited for a command".into());
            }
        }
        Ok(vmm)
    }
}

/// Leaves the snapshot of `vmm` in `dir`, and nothing else.
fn save(vmm: &Vesicle, dir: &Path) -> Result<(), Box<dyn Error>> {
    let paused = vmm.api().patch("/vm", &json!({ "state": "Paused" }))?;
    if paused.status != 204 {
        return Err(paused.fault().into());
    }
    let files = [state(dir), memory(dir)];
    vmm.api().must_put("/snapshot/create", &json!({ "snapshot_path": files[0], "mem_file_path": files[1] }))?;
    for file in files {
        // Jails have users of their own. The directory is ours alone.
        fs::set_permissions(file, Permissions::from_mode(0o644))?;
    }
    fs::remove_file(dir.join("job"))?;
    fs::remove_file(dir.join("log"))?;
    Ok(())
}

fn directory_in(cache: &Path) -> io::Result<TempDir> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(cache)?;
    scratch::directory(NEW, cache)
}

/// Removes a snapshot, of which nobody sees a part.
fn discard(snapshot: &Path) -> io::Result<()> {
    let name = snapshot.file_name().unwrap_or_default().to_string_lossy();
    let aside = snapshot.with_file_name(format!("{NEW}{name}-{}", std::process::id()));
    fs::rename(snapshot, &aside)?;
    fs::remove_dir_all(aside)
}

/// Removes all but the newest, and what runs left behind that were killed. Who runs from one has it open already.
fn prune(cache: &Path) {
    let entries = fs::read_dir(cache).into_iter().flatten().flatten();
    let found = entries.map(|entry| {
        (entry.metadata().and_then(|found| found.modified()).unwrap_or(SystemTime::UNIX_EPOCH), entry.path())
    });
    let is_new = |path: &Path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(NEW.as_bytes()));
    let (new, mut kept): (Vec<_>, Vec<_>) = found.partition(|(_, path)| is_new(path));
    for (made, path) in new {
        if made.elapsed().is_ok_and(|age| age > ABANDONED) {
            let _ = fs::remove_dir_all(path);
        }
    }
    kept.sort_unstable_by(|a, b| b.cmp(a));
    for (_, path) in kept.iter().skip(KEPT) {
        let _ = discard(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_snapshots_stay_and_those_that_somebody_makes() {
        let cache = tempfile::tempdir().unwrap();
        let begin = SystemTime::now() - 2 * ABANDONED;
        for (age, name) in ["new-killed", "a", "b", "c", "d", "e", "f", "new-one"].into_iter().enumerate() {
            let path = cache.path().join(name);
            fs::create_dir(&path).unwrap();
            let made = if name == "new-one" { SystemTime::now() } else { begin + Duration::from_secs(age as u64) };
            File::open(&path).unwrap().set_modified(made).unwrap();
        }
        prune(cache.path());
        let mut left: Vec<_> = fs::read_dir(cache.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort_unstable();
        assert_eq!(left, ["c", "d", "e", "f", "new-one"]);
    }
}
