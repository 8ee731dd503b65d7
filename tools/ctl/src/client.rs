//! HTTP/1.1 with JSON over a Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// Longest reply that is read, in bytes.
const MAX_REPLY: usize = 16 << 20;
/// How long a reply may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket does not take connections.
    #[error("cannot connect to {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What connect(2) said.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke, or what came over it is not HTTP.
    #[error("no reply to {request}")]
    Http {
        /// Method and path.
        request: String,
        /// What the HTTP library said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nothing came in time.
    #[error("no reply to {request} within {} s", TIMEOUT.as_secs())]
    Timeout {
        /// Method and path.
        request: String,
    },
    /// A reply of another status than expected.
    #[error("{request} was refused with status {status}: {fault}")]
    Refused {
        /// Method and path.
        request: String,
        /// The HTTP status.
        status: u16,
        /// The `fault_message`, or the whole body if it has none.
        fault: String,
    },
    /// The runtime that drives the connection could not be made.
    #[error("cannot set up a connection")]
    Runtime(#[source] std::io::Error),
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The body as it came, empty if there is none.
    pub body: String,
}

impl Response {
    /// The body as JSON; `null` if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// The `fault_message` of a refusal, else the body as it is.
    pub fn fault(&self) -> String {
        self.json()["fault_message"].as_str().map_or_else(|| self.body.clone(), str::to_owned)
    }
}

/// A client of one API socket. Every request opens its own connection, so a client can be cloned and shared at will.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the socket at `socket`, which need not exist yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// GET `path`.
    ///
    /// # Errors
    /// If no reply came; a refusal is a reply.
    pub fn get(&self, path: &str) -> Result<Response, ClientError> {
        self.request(Method::GET, path, None)
    }

    /// PUT `body` to `path`.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn put(&self, path: &str, body: &Value) -> Result<Response, ClientError> {
        self.request(Method::PUT, path, Some(body))
    }

    /// PATCH `path` with `body`.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub fn patch(&self, path: &str, body: &Value) -> Result<Response, ClientError> {
        self.request(Method::PATCH, path, Some(body))
    }

    /// PUT `body` to `path`, which must be done (204).
    ///
    /// # Errors
    /// As [`Client::get`], and [`ClientError::Refused`].
    pub fn must_put(&self, path: &str, body: &Value) -> Result<(), ClientError> {
        let reply = self.put(path, body)?;
        if reply.status == 204 {
            return Ok(());
        }
        Err(ClientError::Refused { request: format!("PUT {path}"), status: reply.status, fault: reply.fault() })
    }

    fn request(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Response, ClientError> {
        let request = format!("{method} {path}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(ClientError::Runtime)?.block_on(async {
            tokio::time::timeout(TIMEOUT, self.exchange(method, path, body, &request))
                .await
                .unwrap_or_else(|_| Err(ClientError::Timeout { request: request.clone() }))
        })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        name: &str,
    ) -> Result<Response, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Connect { path: self.socket.clone(), source })?;
        let broken = |source| ClientError::Http { request: name.to_owned(), source };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(e.into()))?;
        // Its end is seen by whoever waits for the reply.
        tokio::spawn(connection);

        let mut builder = Request::builder().method(method).uri(path).header("Host", "localhost");
        if body.is_some() {
            builder = builder.header("Content-Type", "application/json");
        }
        let body = Full::new(body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string())));
        let request = builder.body(body).map_err(|e| broken(e.into()))?;
        let reply = sender.send_request(request).await.map_err(|e| broken(e.into()))?;
        let status = reply.status().as_u16();
        let body = Limited::new(reply.into_body(), MAX_REPLY).collect().await.map_err(broken)?.to_bytes();
        Ok(Response { status, body: String::from_utf8_lossy(&body).into_owned() })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::*;

    /// A server for one connection: returns what was asked once it has given `reply`.
    fn serve(reply: &'static str) -> (tempfile::TempDir, Client, std::thread::JoinHandle<String>) {
        let dir = tempfile::tempdir().unwrap();
        let client = Client::new(dir.path().join("api.sock"));
        let listener = UnixListener::bind(client.socket()).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut buffer = [0; 1024];
            while !asked.ends_with(b"}") && !asked.ends_with(b"\r\n\r\n") {
                let n = stream.read(&mut buffer).unwrap();
                asked.extend_from_slice(&buffer[..n]);
            }
            stream.write_all(reply.as_bytes()).unwrap();
            String::from_utf8(asked).unwrap()
        });
        (dir, client, server)
    }

    #[test]
    fn a_put_carries_its_json_and_returns_status_and_body() {
        let (_dir, client, server) =
            serve("HTTP/1.1 400 Bad Request\r\nContent-Length: 22\r\n\r\n{\"fault_message\":\"no\"}");
        let reply = client.put("/actions", &json!({"action_type": "InstanceStart"})).unwrap();
        let asked = server.join().unwrap();
        assert!(asked.starts_with("PUT /actions HTTP/1.1\r\n"), "{asked}");
        assert!(asked.ends_with("\r\n\r\n{\"action_type\":\"InstanceStart\"}"), "{asked}");
        assert_eq!((reply.status, reply.fault()), (400, "no".to_owned()));
    }

    #[test]
    fn done_has_no_body_and_a_refusal_is_an_error_where_done_was_due() {
        let (_dir, client, server) = serve("HTTP/1.1 204 No Content\r\n\r\n");
        client.must_put("/vsock", &json!({})).unwrap();
        server.join().unwrap();

        let (_dir, client, _server) = serve("HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad");
        let error = client.must_put("/vsock", &json!({})).unwrap_err().to_string();
        assert_eq!(error, "PUT /vsock was refused with status 400: bad");
    }

    #[test]
    fn a_server_that_hangs_up_is_an_error() {
        let (_dir, client, _server) = serve("");
        assert!(matches!(client.get("/"), Err(ClientError::Http { .. })));
        assert!(matches!(Client::new("/nowhere").get("/"), Err(ClientError::Connect { .. })));
    }
}
