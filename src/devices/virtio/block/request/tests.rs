//! Stories of requests whose host does things by halves.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::*;
use crate::memory::GuestMemory;

const SECTORS: u64 = 64;
const ANYTHING: Rules = Rules { read_only: false, flush: true, discard: true };

fn memory() -> GuestMemory {
    crate::memory::pieces(&[(0, 1 << 20)])
}

fn disk() -> Disk {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&pattern(0), 0).unwrap();
    Disk::new(file.into(), "d").unwrap()
}

fn pattern(salt: usize) -> Vec<u8> {
    (0..(SECTORS * SECTOR_SIZE) as usize).map(|i| (i * 7 + i / 251 + salt) as u8).collect()
}

/// A request of `kind` at sector 0 for all the data at 0x1000, in pieces of 1000 bytes.
fn request(memory: &GuestMemory, kind: u32, data: u64, disk: &Disk) -> (Request, Step) {
    let host = |at| memory.get_host_address(GuestAddress(at)).unwrap();
    memory.write_obj([kind, 0, 0, 0], GuestAddress(0)).unwrap();
    let mut request = Request::default();
    let Buffers { readable, writable } = &mut request.buffers;
    readable.push(host(0), 16);
    let vecs = if kind == VIRTIO_BLK_T_IN { &mut *writable } else { readable };
    for at in (0..data).step_by(1000) {
        vecs.push(host(0x1000 + at), 1000.min(data - at) as usize);
    }
    writable.push(host(0x100), 1);
    // SAFETY: the caller holds the memory.
    let step = unsafe { request.parse(3, disk, ANYTHING) }.unwrap();
    (request, step)
}

/// A host that does at most `most` bytes at a time, and supports no fallocate.
fn reluctantly(most: usize, file: &File, operation: &Operation<'_>) -> io::Result<usize> {
    let (vecs, write, mut offset) = match *operation {
        Operation::Read { into, offset } => (into, false, offset),
        Operation::Write { from, offset } => (from, true, offset),
        Operation::Sync => return Ok(0),
        Operation::Allocate { .. } => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
    };
    let mut done = 0;
    for vec in vecs {
        let step = vec.iov_len.min(most - done);
        let mut bytes = vec![0; step];
        // SAFETY: the request's memory is alive; nobody else accesses it.
        let slice = unsafe { VolatileSlice::<()>::new(vec.iov_base.cast(), step) };
        if write {
            slice.copy_to(&mut bytes);
            file.write_all_at(&bytes, offset)?;
        } else {
            file.read_exact_at(&mut bytes, offset)?;
            slice.copy_from(&bytes);
        }
        offset += step as u64;
        done += step;
    }
    Ok(done)
}

fn carry_out(request: &mut Request, mut step: Step, most: usize, disk: &mut Disk) -> Status {
    loop {
        match step {
            Step::Operate => {
                let result = reluctantly(most, &disk.file, &request.operation(disk).1);
                step = request.advance(result, disk);
            }
            Step::Done(status) => return status,
            Step::Failed(error) => panic!("{error}"),
        }
    }
}

#[test]
fn what_the_host_does_in_parts_is_neither_repeated_nor_lost() {
    let length = SECTORS * SECTOR_SIZE;
    for most in [1, 7, 511, 512, 999, 1000, 1001, 4096, 1 << 20] {
        let (memory, mut disk) = (memory(), disk());
        let (mut read, step) = request(&memory, VIRTIO_BLK_T_IN, length, &disk);
        assert_eq!(carry_out(&mut read, step, most, &mut disk), Status::Ok);
        // SAFETY: the memory is alive.
        assert_eq!(unsafe { read.finish(Status::Ok) }, (3, length as u32 + 1));
        let mut data = vec![0; length as usize];
        memory.read_slice(&mut data, GuestAddress(0x1000)).unwrap();
        assert_eq!(data, pattern(0));

        memory.write_slice(&pattern(99), GuestAddress(0x1000)).unwrap();
        let (mut write, step) = request(&memory, VIRTIO_BLK_T_OUT, length, &disk);
        assert_eq!(carry_out(&mut write, step, most, &mut disk), Status::Ok);
        disk.file.read_exact_at(&mut data, 0).unwrap();
        assert_eq!(data, pattern(99));
    }
}

#[test]
fn a_host_that_can_neither_punch_nor_zero_is_written_zeroes() {
    for unmap in [0u32, 1] {
        let (memory, mut disk) = (memory(), disk());
        memory.write_obj([1, 0, SECTORS as u32 - 2, unmap], GuestAddress(0x1000)).unwrap();
        let (mut zero, step) = request(&memory, VIRTIO_BLK_T_WRITE_ZEROES, 16, &disk);
        assert_eq!(carry_out(&mut zero, step, 777, &mut disk), Status::Ok);
        let mut expected = pattern(0);
        let end = expected.len() - 512;
        expected[512..end].fill(0);
        let mut data = vec![0; expected.len()];
        disk.file.read_exact_at(&mut data, 0).unwrap();
        assert_eq!(data, expected);
    }
}

#[test]
fn a_discard_the_host_does_not_know_is_unsupported() {
    let (memory, mut disk) = (memory(), disk());
    memory.write_obj([0u32, 0, 8, 0], GuestAddress(0x1000)).unwrap();
    let (mut discard, step) = request(&memory, VIRTIO_BLK_T_DISCARD, 16, &disk);
    assert_eq!(carry_out(&mut discard, step, 1, &mut disk), Status::Unsupported);
}

#[test]
fn an_error_of_the_host_ends_a_request() {
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH] {
        let (memory, mut disk) = (memory(), disk());
        let (mut request, step) = request(&memory, kind, 512, &disk);
        assert!(matches!(step, Step::Operate));
        let error = io::Error::from_raw_os_error(libc::EIO);
        assert!(matches!(request.advance(Err(error), &mut disk), Step::Failed(_)));
        // SAFETY: the memory is alive.
        assert_eq!(unsafe { request.finish(Status::IoError) }, (3, 1));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100)).unwrap(), 1);
    }
}
