//! Requests over one open connection to a VMM's API, as launchers have it: timed here, without an HTTP library's own
//! time in it.

use std::error::Error;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A connection.
#[derive(Debug)]
pub struct Http(UnixStream);

impl Http {
    /// Over `stream`, which sets how long a reply may take.
    pub fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// A request that must be done (204); how long it took.
    pub fn must(&mut self, method: &str, path: &str, body: &Value) -> Result<Duration, Box<dyn Error>> {
        let body = body.to_string();
        let start = Instant::now();
        let reply = self.request(method, path, &body)?;
        let took = start.elapsed();
        if reply.starts_with("HTTP/1.1 204") { Ok(took) } else { Err(format!("{method} {path}: {reply}").into()) }
    }

    /// Sends a request; returns the reply as it came.
    pub fn request(&mut self, method: &str, path: &str, body: &str) -> io::Result<String> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0.write_all(request.as_bytes())?;
        let mut reply = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let count = self.0.read(&mut buffer)?;
            reply.extend_from_slice(&buffer[..count]);
            let text = String::from_utf8_lossy(&reply);
            if is_whole(&text) {
                return Ok(text.into_owned());
            }
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Whether a reply is there up to the end of its body.
fn is_whole(reply: &str) -> bool {
    let Some((head, body)) = reply.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    body.len() >= length.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_whole_with_its_body() {
        assert!(is_whole("HTTP/1.1 204 No Content\r\n\r\n"));
        assert!(!is_whole("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{"));
        assert!(is_whole("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"));
        assert!(!is_whole("HTTP/1.1 204 No Content\r\n"));
    }
}
