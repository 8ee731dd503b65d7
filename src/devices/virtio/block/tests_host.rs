//! Stories of what drives ask of the host, and of hosts that have their limits.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::tests::*;
use super::*;
use crate::devices::virtio::testing::{readable, writable};

#[test]
fn a_discard_frees_blocks_of_the_host() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 4 << 20);
        drive.file.write_all_at(&pattern(4 << 20), 0).unwrap();
        let before = drive.file.metadata().unwrap().blocks();
        drive.segment(0, 0, 2048, 0);
        drive.segment(1, 4096, 2048, 0);
        assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 32)]), (OK, 1));
        let metadata = drive.file.metadata().unwrap();
        assert!(metadata.blocks() <= before - 4096, "{before} blocks before, {} after", metadata.blocks());
        assert_eq!(metadata.len(), 4 << 20);
        assert_eq!(on_disk(&drive, 1 << 20, 512), pattern(4 << 20)[1 << 20..][..512], "not discarded");
        assert_eq!(drive.metrics.discard_count.get(), 1);
    }
}

#[test]
fn write_zeroes_leaves_zeroes_and_nothing_else_zero() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 4 << 20);
        for flags in [0, 1] {
            drive.file.write_all_at(&vec![0xff; 4 << 20], 0).unwrap();
            drive.segment(0, 3, 4091, flags);
            assert_eq!(drive.request(WRITE_ZEROES, 0, &[readable(DATA, 16)]), (OK, 1));
            assert_eq!(on_disk(&drive, 0, 3 * 512), [0xff; 3 * 512]);
            assert!(on_disk(&drive, 3 * 512, 4091 * 512).iter().all(|&byte| byte == 0));
            assert_eq!(on_disk(&drive, 4094 * 512, 512), [0xff; 512]);
        }
    }
}

#[test]
fn discards_and_write_zeroes_with_bad_flags_ranges_or_counts_are_refused_whole() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 1 << 20);
        drive.file.write_all_at(&[0xff; 1 << 20], 0).unwrap();
        for (kind, sector, count, flags, status) in [
            (DISCARD, 0, 8, 1, UNSUPP),
            (DISCARD, 0, 8, 2, UNSUPP),
            (WRITE_ZEROES, 0, 8, 2, UNSUPP),
            (WRITE_ZEROES, 0, 8, u32::MAX, UNSUPP),
            (DISCARD, 2048, 1, 0, IOERR),
            (DISCARD, 2047, 2, 0, IOERR),
            (DISCARD, u64::MAX, 1, 0, IOERR),
            (DISCARD, u64::MAX, u32::MAX, 0, IOERR),
            (WRITE_ZEROES, 0, MAX_ZEROES_SECTORS + 1, 0, IOERR),
            (WRITE_ZEROES, 2048, 1, 1, IOERR),
            (DISCARD, 0, 0, 0, OK),
        ] {
            drive.segment(0, sector, count, flags);
            assert_eq!(drive.request(kind, 0, &[readable(DATA, 16)]), (status, 1), "{kind} {sector} {count}");
        }
        assert_eq!(drive.metrics.discard_count.get(), 1, "of nothing at all");
        for length in [0, 1, 15, 17, 16 * 17] {
            assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, length)]), (IOERR, 1), "{length} bytes");
        }
        drive.segment(0, 0, 8, 0);
        drive.segment(1, 8, 8, 0);
        assert_eq!(drive.request(WRITE_ZEROES, 0, &[readable(DATA, 32)]), (IOERR, 1), "two segments");
        drive.segment(1, 2048, 8, 0);
        assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 32)]), (IOERR, 1), "the second is bad");
        assert!(on_disk(&drive, 0, 1 << 20).iter().all(|&byte| byte == 0xff), "nothing was touched");
        assert!(!needs_reset(&drive));
    }
}

#[test]
fn a_host_file_cut_short_under_the_guest_is_an_io_error() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 1 << 20);
        drive.file.write_all_at(&pattern(4096), 0).unwrap();
        drive.file.set_len(2048).unwrap();
        let (status, written) = drive.request(IN, 0, &[writable(DATA, 4096)]);
        assert_eq!((status, written), (IOERR, 2049), "half was read");
        assert_eq!(drive.request(IN, 512, &[writable(DATA, 4096)]), (IOERR, 1));
        assert_eq!(drive.request(IN, 0, &[writable(DATA, 2048)]), (OK, 2049));
        assert_eq!(drive.request(OUT, 512, &[readable(DATA, 4096)]), (OK, 1), "a write makes the file long again");
        assert_eq!(drive.metrics.execute_fails.get(), 2);
    }
}

#[test]
fn a_host_that_refuses_is_an_io_error() {
    for engine in engines() {
        // The file cannot be read, as a disk that fails cannot.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        let drive = Drive::new(&drive(engine), file);
        assert_eq!(drive.request(IN, 0, &[writable(DATA, 4096)]), (IOERR, 1));
        assert_eq!(drive.request(OUT, 0, &[readable(DATA, 4096)]), (OK, 1));
        assert_eq!(drive.metrics.execute_fails.get(), 1);
        assert!(!needs_reset(&drive));
    }
}

/// A file on a file system of its own that holds `size` bytes. If we may not have one, the story is left out, and says so.
pub(super) fn file_on_a_small_file_system(size: u64) -> Option<File> {
    let file = mounted(size);
    if file.is_none() {
        eprintln!("SKIPPED: a file system of its own: {}", io::Error::last_os_error());
    }
    file
}

fn mounted(size: u64) -> Option<File> {
    use std::ffi::CString;
    use std::os::fd::{AsRawFd, FromRawFd};
    let string = |text: &str| CString::new(text).unwrap();
    let call = |number, args: [i64; 5]| {
        // SAFETY: fsopen, fsconfig, fsmount and openat read NUL-terminated strings that outlive the call.
        let fd = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) };
        (fd >= 0).then_some(fd)
    };
    // SAFETY: the descriptor is new and ours.
    let own = |fd: i64| unsafe { File::from_raw_fd(fd as i32) };
    let (tmpfs, key, value, name) = (string("tmpfs"), string("size"), string(&size.to_string()), string("disk"));
    let context = own(call(libc::SYS_fsopen, [tmpfs.as_ptr() as i64, 0, 0, 0, 0])?);
    let fd = i64::from(context.as_raw_fd());
    call(libc::SYS_fsconfig, [fd, 1, key.as_ptr() as i64, value.as_ptr() as i64, 0])?;
    call(libc::SYS_fsconfig, [fd, 6, 0, 0, 0])?;
    let root = own(call(libc::SYS_fsmount, [fd, 0, 0, 0, 0])?);
    let flags = i64::from(libc::O_RDWR | libc::O_CREAT);
    Some(own(call(libc::SYS_openat, [root.as_raw_fd().into(), name.as_ptr() as i64, flags, 0o600, 0])?))
}

#[test]
fn a_full_host_file_system_is_an_io_error_until_there_is_room() {
    for engine in engines() {
        let Some(file) = file_on_a_small_file_system(64 << 10) else { return };
        file.set_len(1 << 20).unwrap();
        let drive = Drive::new(&drive(engine), file);
        drive.guest.put(DATA, &pattern(128 << 10));
        assert_eq!(drive.request(OUT, 0, &[readable(DATA, 128 << 10)]), (IOERR, 1));
        drive.segment(0, 0, 256, 0);
        assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 16)]), (OK, 1));
        assert_eq!(drive.request(OUT, 0, &[readable(DATA, 32 << 10)]), (OK, 1));
        assert!(!needs_reset(&drive));
    }
}

#[test]
fn zeroes_are_written_where_the_host_cannot_zero_a_range() {
    for engine in engines() {
        let Some(file) = file_on_a_small_file_system(4 << 20) else { return };
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[0xff; 1 << 20], 0).unwrap();
        let drive = Drive::new(&drive(engine), file);
        let before = drive.file.metadata().unwrap().blocks();
        drive.segment(0, 1, 1023, 0);
        assert_eq!(drive.request(WRITE_ZEROES, 0, &[readable(DATA, 16)]), (OK, 1));
        assert_eq!(drive.file.metadata().unwrap().blocks(), before, "unmap was not allowed");
        assert!(on_disk(&drive, 512, 1023 * 512).iter().all(|&byte| byte == 0));
        assert_eq!(on_disk(&drive, 0, 512), [0xff; 512]);
        assert_eq!(on_disk(&drive, 1 << 19, 512), [0xff; 512]);
    }
}

#[test]
fn the_limits_in_the_configuration_space_are_the_limits() {
    let drive = Drive::of_size(&drive(IoEngine::Sync), 4 << 30);
    for (kind, most) in [(DISCARD, MAX_DISCARD_SECTORS), (WRITE_ZEROES, MAX_ZEROES_SECTORS)] {
        for (sectors, status) in [(most, OK), (most + 1, IOERR)] {
            drive.segment(0, 0, sectors, 0);
            assert_eq!(drive.request(kind, 0, &[readable(DATA, 16)]), (status, 1), "{sectors}");
        }
    }
}

/// Makes the calling thread's `io_uring_setup` fail with `errno`, as hosts do that keep it from programs.
fn refuse_io_uring(errno: i32) {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};
    let statement = |code: u32, k: u32| sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let filter = [
        statement(BPF_LD | BPF_W | BPF_ABS, 0),
        sock_filter { jf: 1, ..statement(BPF_JMP | BPF_JEQ | BPF_K, libc::SYS_io_uring_setup as u32) },
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32),
        statement(BPF_RET | BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program outlives the calls, which copy it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn a_host_without_io_uring_is_said_to_have_none() {
    for errno in [libc::ENOSYS, libc::EPERM] {
        let refused = std::thread::spawn(move || {
            refuse_io_uring(errno);
            let file = tempfile::tempfile().unwrap();
            Block::new(&drive(IoEngine::Async), file, Arc::new(metrics::Block::default())).err()
        });
        let Some(error @ Error::Async(_)) = refused.join().unwrap() else { panic!("it was not refused") };
        let text = error.to_string();
        assert!(text.contains("io_uring") && text.contains("use Sync"), "{text}");
        let cause = std::error::Error::source(&error).unwrap().downcast_ref::<io::Error>().unwrap();
        assert_eq!(cause.raw_os_error(), Some(errno));
    }
}
