//! A host process's end of a connection: a Unix socket, read into and written from guest memory, and what it
//! did not take at once.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use libc::iovec;
use socket2::{Domain, SockAddr, Socket, Type};

use super::packet::Done;
use crate::devices::virtio::IoVecs;
use crate::os::{checked, retried};

/// Longest line that may ask for a connection, in bytes.
const MAX_LINE: usize = 32;
/// Most buffers in one system call (`IOV_MAX`).
const MAX_VECS: usize = 1024;

/// What a host peer that asks for a connection has sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeting {
    /// `CONNECT port\n`, which is read; what follows belongs to the connection.
    Port(u32),
    /// The beginning of it.
    Incomplete,
    /// Something else, or the end.
    Wrong,
}

/// See the module.
#[derive(Debug)]
pub struct Peer {
    stream: UnixStream,
    /// From `taken` on, what the socket has still to take.
    backlog: Vec<u8>,
    taken: usize,
    /// Directions that were shut down for it.
    finished: Done,
}

impl Peer {
    /// The peer behind a socket that was accepted.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, backlog: Vec::new(), taken: 0, finished: Done::default() }
    }

    /// Connects to the socket at `path`, at once or not at all.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Ok(Self::new(OwnedFd::from(socket).into()))
    }

    /// Takes the line that asks for a connection off the stream, once it is whole.
    pub fn greeting(&self) -> Greeting {
        let mut line = [0; MAX_LINE];
        let Ok(count) = self.receive(&mut line, libc::MSG_PEEK) else { return Greeting::Incomplete };
        let Some(end) = line[..count].iter().position(|&byte| byte == b'\n') else {
            let open = (1..MAX_LINE).contains(&count);
            return if open { Greeting::Incomplete } else { Greeting::Wrong };
        };
        let mut words = line[..end].split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let command = words.next().is_some_and(|word| word.eq_ignore_ascii_case(b"connect"));
        let port = words.next().and_then(|word| str::from_utf8(word).ok()?.parse().ok());
        match (command, port) {
            (true, Some(port)) if self.receive(&mut line[..=end], 0).is_ok_and(|count| count == end + 1) => {
                Greeting::Port(port)
            }
            _ => Greeting::Wrong,
        }
    }

    /// Says that the guest accepted, and which port the connection has on the host.
    pub fn accepted(&mut self, port: u32) -> io::Result<()> {
        let line = format!("OK {port}\n");
        let vec = iovec { iov_base: line.as_ptr().cast_mut().cast(), iov_len: line.len() };
        // SAFETY: the buffer is the line, which lives for the call.
        let sent = unsafe { self.send(&[vec]) }?;
        // Nothing was sent before: it fits, or the peer has gone.
        if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn receive(&self, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
        let (fd, flags) = (self.stream.as_raw_fd(), flags | libc::MSG_DONTWAIT);
        // SAFETY: the buffer is valid for writing as many bytes.
        retried(|| checked(unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), flags) }))
    }

    /// Reads into `buffers`. Returns how many bytes, and whether there was room for more: then there are none left
    /// at the moment. 0 bytes are the end.
    ///
    /// # Errors
    ///
    /// WouldBlock if there are none yet; anything else ends the connection.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn read(&self, buffers: &IoVecs) -> io::Result<(usize, bool)> {
        let vecs = buffers.as_slice();
        let vecs = &vecs[..vecs.len().min(MAX_VECS)];
        let (fd, mut message) = (self.stream.as_raw_fd(), message(vecs));
        // SAFETY: every entry lies within guest RAM, alive by this function's contract; the message refers to as
        // many entries as there are.
        let count = retried(|| checked(unsafe { libc::recvmsg(fd, &mut message, libc::MSG_DONTWAIT) }))?;
        // A descriptor that came along (SCM_RIGHTS) is dropped, and ends a read before there is nothing left.
        let cut_short = message.msg_flags & libc::MSG_CTRUNC != 0;
        Ok((count, count < vecs.iter().map(|vec| vec.iov_len).sum() && !cut_short))
    }

    /// Sends what it can now, which may be nothing.
    ///
    /// # Safety
    ///
    /// The buffers are alive.
    unsafe fn send(&self, vecs: &[iovec]) -> io::Result<usize> {
        let (fd, message) = (self.stream.as_raw_fd(), message(&vecs[..vecs.len().min(MAX_VECS)]));
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the entries are alive by this function's contract; the message refers to as many as there are.
        match retried(|| checked(unsafe { libc::sendmsg(fd, &message, flags) })) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }

    /// Hands `data` on and keeps what the peer does not take. Returns how many bytes it took.
    ///
    /// # Errors
    ///
    /// The peer will not receive any more.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn write(&mut self, data: &mut IoVecs) -> io::Result<u32> {
        let mut sent = 0;
        if !self.has_backlog() && !data.is_empty() {
            // SAFETY: by this function's contract.
            sent = unsafe { self.send(data.as_slice()) }?;
            data.advance(sent as u64);
        }
        if !data.is_empty() {
            self.backlog.drain(..self.taken);
            self.taken = 0;
            // SAFETY: by this function's contract.
            unsafe { data.read_to(&mut self.backlog) };
        }
        Ok(sent as u32)
    }

    /// Hands the backlog on. Returns how many bytes of it the peer took.
    ///
    /// # Errors
    ///
    /// The peer will not receive any more.
    pub fn flush(&mut self) -> io::Result<u32> {
        let left = &self.backlog[self.taken..];
        if left.is_empty() {
            return Ok(0);
        }
        let vec = iovec { iov_base: left.as_ptr().cast_mut().cast(), iov_len: left.len() };
        // SAFETY: the buffer is the backlog, which lives for the call.
        let sent = unsafe { self.send(&[vec]) }?;
        self.taken += sent;
        if self.taken == self.backlog.len() {
            self.forget_backlog();
        }
        Ok(sent as u32)
    }

    /// Whether there is something it did not take.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Gives the backlog's memory back.
    pub fn forget_backlog(&mut self) {
        (self.backlog, self.taken) = (Vec::new(), 0);
    }

    /// Shuts the directions down in which it has nothing to expect any more.
    pub fn finish(&mut self, done: Done) {
        let before = self.finished;
        self.finished = before.and(done);
        // A peer that has gone has finished, too.
        if self.finished.receive && !before.receive {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.finished.send && !before.send {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
    }
}

impl AsRawFd for Peer {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.stream.as_raw_fd()
    }
}

/// A message of these buffers; nobody writes through it but the kernel.
fn message(vecs: &[iovec]) -> libc::msghdr {
    // SAFETY: all zeros is a message without name, buffers and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vecs.as_ptr().cast_mut();
    // An int in some libc; there are never more than IOV_MAX.
    message.msg_iovlen = vecs.len() as _;
    message
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;

    #[test]
    fn the_line_that_asks_is_taken_off_the_stream_and_nothing_else() {
        for (sent, expected) in [
            ("CONNECT 52\nrest", Greeting::Port(52)),
            ("connect  4294967295 please\nrest", Greeting::Port(u32::MAX)),
            ("CONN", Greeting::Incomplete),
            ("CONNECT 52", Greeting::Incomplete),
            ("CONNECT 4294967296\n", Greeting::Wrong),
            ("CONNECT -1\n", Greeting::Wrong),
            ("CONNECT\n", Greeting::Wrong),
            ("HELLO 52\n", Greeting::Wrong),
            ("\n", Greeting::Wrong),
            ("CONNECT 00000000000000000000000052\n", Greeting::Wrong),
            ("\u{ff}\u{ff}\n", Greeting::Wrong),
        ] {
            let (mut client, stream) = UnixStream::pair().unwrap();
            let peer = Peer::new(stream);
            assert_eq!(peer.greeting(), Greeting::Incomplete);
            client.write_all(sent.as_bytes()).unwrap();
            assert_eq!(peer.greeting(), expected, "{sent:?}");
            if let Greeting::Port(_) = expected {
                let mut rest = [0; 8];
                let count = (&peer.stream).read(&mut rest).unwrap();
                assert_eq!(&rest[..count], b"rest");
            }
        }
        let (client, stream) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(Peer::new(stream).greeting(), Greeting::Wrong);
    }

    #[test]
    fn descriptors_that_come_along_are_dropped_and_hide_nothing() {
        let (client, stream) = UnixStream::pair().unwrap();
        let peer = Peer::new(stream);
        client.send_with_fd(&b"one"[..], client.as_raw_fd()).unwrap();
        (&client).write_all(b"two").unwrap();
        let mut data = [0; 100];
        let mut vecs = IoVecs::default();
        vecs.push(data.as_mut_ptr(), data.len());
        // SAFETY: the buffer is the array, which is alive.
        let read = || unsafe { peer.read(&vecs) }.unwrap();
        assert_eq!(read(), (3, false), "there is more");
        assert_eq!(read(), (3, true));
    }

    #[test]
    fn a_peer_that_has_gone_is_an_error_and_no_signal() {
        let (client, stream) = UnixStream::pair().unwrap();
        drop(client);
        let mut peer = Peer::new(stream);
        assert_eq!(peer.accepted(7).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        peer.backlog.push(1);
        assert!(peer.flush().is_err());
    }

    #[test]
    fn a_backlog_goes_out_in_order_and_its_memory_goes_back() {
        let (mut client, stream) = UnixStream::pair().unwrap();
        let mut peer = Peer::new(stream);
        let mut first = vec![1; 1 << 20];
        let mut second = vec![2; 1000];
        for data in [&mut first, &mut second] {
            let mut vecs = IoVecs::default();
            vecs.push(data.as_mut_ptr(), data.len());
            // SAFETY: the buffer is the vector, which is alive.
            unsafe { peer.write(&mut vecs) }.unwrap();
        }
        assert!(peer.has_backlog());
        let mut received = Vec::new();
        while received.len() < first.len() + second.len() {
            let mut part = [0; 10_000];
            let count = client.read(&mut part).unwrap();
            received.extend_from_slice(&part[..count]);
            peer.flush().unwrap();
        }
        assert!(received == [first, second].concat());
        assert!(!peer.has_backlog() && peer.backlog.capacity() == 0);
    }
}
