//! The host's end of the benchmarks' network: a TAP and a server behind it.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::thread;

/// The TAP's name.
pub const NAME: &str = "vesicle-bench";
/// Its address, the guest's, and the port of both.
pub const ADDRESS: &str = "10.77.0.1";
pub const GUEST: &str = "10.77.0.2";
pub const PORT: u16 = 7777;
/// What one system call sends or receives at most, in bytes.
const CHUNK: usize = 128 << 10;

/// The TAP with its server, which serves one connection. The TAP goes when this is dropped.
#[derive(Debug)]
pub struct Host(());

impl Host {
    /// Makes the TAP and serves guests of that kind, which ask for `count`. It takes root.
    pub fn start(kind: &'static str, count: u32) -> Result<Self, Box<dyn Error>> {
        Self::start_with(move |connection| serve(connection, kind, count))
    }

    /// Makes the TAP and does that with the guest's connection. It takes root.
    pub fn start_with(
        serve: impl FnOnce(TcpStream) -> io::Result<()> + Send + 'static,
    ) -> Result<Self, Box<dyn Error>> {
        // One that an aborted run has left.
        let _ = ip(&["link", "del", NAME]);
        ip(&["tuntap", "add", "dev", NAME, "mode", "tap", "vnet_hdr"])?;
        let host = Self(());
        ip(&["addr", "add", &format!("{ADDRESS}/24"), "dev", NAME])?;
        ip(&["link", "set", NAME, "up"])?;
        let listener = TcpListener::bind((ADDRESS, PORT))?;
        // It ends with the guest, or with the process; what went wrong the guest finds out.
        thread::spawn(move || {
            let (connection, _) = listener.accept()?;
            // The next one listens there, though this connection may outlive its guest.
            drop(listener);
            serve(connection)
        });
        Ok(host)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // A guest that failed has left the server waiting.
        let _ = TcpStream::connect((ADDRESS, PORT));
        let _ = ip(&["link", "del", NAME]);
    }
}

fn ip(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    let output = Command::new("ip").args(arguments).output().map_err(|error| format!("cannot run ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim_end()).into())
}

/// Does its part of what resources/bench/init.rs says.
fn serve(mut connection: TcpStream, kind: &str, count: u32) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut buffer = vec![0; CHUNK];
    if kind == "tcp-receive" {
        connection.read_exact(&mut buffer[..1])?;
        for _ in 0..(count as usize) << 20 >> CHUNK.ilog2() {
            connection.write_all(&buffer)?;
        }
    }
    loop {
        match connection.read(&mut buffer)? {
            0 => return connection.shutdown(Shutdown::Both),
            1 if kind == "tcp-round-trip" => connection.write_all(&buffer[..1])?,
            _ => {}
        }
    }
}
