//! Each test confines a thread of its own.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::thread;

use super::*;

/// Runs `story` on a thread, if this machine has Landlock.
fn confined(story: impl FnOnce() + Send + 'static) {
    if kernel_abi().is_ok() {
        thread::spawn(story).join().unwrap();
    } else {
        eprintln!("SKIPPED: no Landlock");
    }
}

fn landlock(allow: &[(&Path, bool)]) -> Landlock {
    let allow = allow
        .iter()
        .map(|(path, write)| crate::config::AllowedPath { path: (*path).to_owned(), write: *write })
        .collect();
    Landlock::new(&LandlockConfig { least_abi: 1, allow }).unwrap()
}

fn denied<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == ErrorKind::PermissionDenied)
}

#[test]
fn the_process_executes_nothing_and_speaks_no_tcp() {
    confined(|| {
        let landlock = landlock(&[]);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        landlock.confine_process(&Grants::default(), None).unwrap();
        assert!(denied(std::process::Command::new("/bin/true").status()));
        assert!(fs::read("/proc/self/status").is_ok(), "paths are left");
        if landlock.abi() >= 4 {
            assert!(denied(std::net::TcpStream::connect(address)));
            assert!(denied(std::net::TcpListener::bind("127.0.0.1:0")));
        }
    });
}

#[test]
fn a_thread_opens_nothing_and_keeps_what_is_open() {
    confined(|| {
        let mut open = tempfile::tempfile().unwrap();
        landlock(&[]).confine_thread().unwrap();
        assert!(denied(File::open("/dev/null")));
        assert!(denied(fs::read_dir("/")));
        io::Write::write_all(&mut open, b"still").unwrap();
    });
}

#[test]
fn the_vmm_thread_keeps_the_directories_of_what_was_configured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    confined(move || {
        for name in ["read", "write", "vsock", "other"] {
            fs::create_dir(path.join(name)).unwrap();
            fs::write(path.join(name).join("file"), "x").unwrap();
        }
        let socket = path.join("vsock/socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let mut grants = Grants::default();
        grants.siblings(&path.join("read/file"), false);
        grants.siblings(&path.join("write/file"), true);
        grants.siblings(&path.join("gone/file"), true);
        grants.socket(&socket);
        landlock(&[]).confine_vmm(&grants).unwrap();
        assert!(restricts_paths());

        let write = |name: &str| OpenOptions::new().write(true).open(path.join(name));
        assert_eq!(fs::read(path.join("read/file")).unwrap(), b"x");
        assert!(denied(write("read/file")) && denied(fs::remove_file(path.join("read/file"))));
        write("write/file").unwrap();
        File::create(path.join("write/new")).unwrap();
        fs::rename(path.join("write/new"), path.join("write/newer")).unwrap();
        fs::remove_file(path.join("write/newer")).unwrap();
        assert!(denied(fs::create_dir(path.join("write/dir"))));
        assert!(denied(std::os::unix::fs::symlink("x", path.join("write/link"))));
        assert!(denied(fs::read(path.join("vsock/file"))));
        fs::remove_file(&socket).unwrap();
        assert!(denied(fs::read(path.join("other/file"))));
        assert!(denied(File::open("/dev/null")));
    });
}

#[test]
fn a_path_that_is_granted_twice_takes_one_rule_with_both_rights() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    confined(move || {
        fs::write(&file, "x").unwrap();
        let mut grants = Grants::default();
        grants.siblings(&file, false);
        grants.removal(&file);
        assert_eq!(grants.0.len(), 1);
        landlock(&[]).confine_vmm(&grants).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"x");
        fs::remove_file(&file).unwrap();
        drop(dir);
    });
}

#[test]
fn with_allowed_paths_the_rest_is_gone_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    confined(move || {
        for name in ["ro", "rw", "needed", "open", "other"] {
            fs::create_dir(path.join(name)).unwrap();
            fs::write(path.join(name).join("file"), "x").unwrap();
        }
        let mut needed = Grants::default();
        needed.read(&path.join("needed/file"));
        let (ro, rw, open) = (path.join("ro"), path.join("rw"), File::open(path.join("open")).unwrap());
        landlock(&[(&ro, false), (&rw, true)]).confine_process(&needed, Some(open.as_fd())).unwrap();
        assert!(fs::read(ro.join("file")).is_ok() && denied(fs::write(ro.join("file"), "y")));
        fs::write(rw.join("file"), "y").unwrap();
        assert!(fs::read(path.join("needed/file")).is_ok());
        assert!(fs::read(path.join("open/file")).is_ok());
        assert!(denied(fs::read(path.join("other/file"))));
    });
}

#[test]
fn what_the_host_does_not_have_is_refused() {
    let Ok(found) = kernel_abi() else { return eprintln!("SKIPPED: no Landlock") };
    let newer = LandlockConfig { least_abi: found + 1, allow: Vec::new() };
    let refused = Landlock::new(&newer).unwrap_err();
    assert!(matches!(refused, Error::TooOld { found: here, .. } if here == found), "{refused}");
    let missing = crate::config::AllowedPath { path: "/no/such/path".into(), write: false };
    let refused = Landlock::new(&LandlockConfig { least_abi: 1, allow: vec![missing] }).unwrap_err();
    assert!(matches!(refused, Error::Path { .. }) && refused.to_string().contains("/no/such/path"), "{refused}");
}

#[test]
fn a_file_is_in_its_directory() {
    let of = |path: &str| directory(Path::new(path));
    assert_eq!(of("/a/b"), Path::new("/a"));
    assert_eq!(of("/b"), Path::new("/"));
    assert_eq!(of("b"), Path::new("."));
    assert_eq!(of("/"), Path::new("/"));
}
