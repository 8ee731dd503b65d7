//! HTTP/1.0 and 1.1 as far as the metadata service speaks it (RFC 9112): bytes in, bytes out.

use std::time::Duration;

use httparse::{EMPTY_HEADER, Header, Status};

use super::Mmds;
use super::store::{Format, LookupError, collapse_slashes};
use crate::config::MmdsVersion;
use crate::metrics::METRICS;

/// Longest request in bytes, body included.
pub const MAX_REQUEST: usize = 4096;
/// Most header fields of a request.
const MAX_HEADERS: usize = 48;

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TTL: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];
const FORWARDED: [&str; 1] = ["X-Forwarded-For"];

const TEXT: &str = "text/plain";
const JSON: &str = "application/json";

/// The answer to the request at the front of what was received.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Bytes of the request.
    pub consumed: usize,
    /// Head and body of the response.
    pub bytes: Vec<u8>,
    /// The connection ends with it.
    pub close: bool,
}

/// A status line's number and words, and the rest of a response.
struct Response {
    status: (u16, &'static str),
    content_type: &'static str,
    /// A further header field.
    header: Option<(String, String)>,
    body: String,
}

impl Response {
    fn ok(content_type: &'static str, body: String) -> Self {
        Self { status: (200, "OK"), content_type, header: None, body }
    }

    fn refusal(status: (u16, &'static str), body: impl Into<String>) -> Self {
        Self { status, content_type: TEXT, header: None, body: body.into() }
    }

    fn bad_request(body: impl Into<String>) -> Self {
        Self::refusal((400, "Bad Request"), body)
    }

    fn bytes(&self, version: u8, close: bool, with_body: bool) -> Vec<u8> {
        let (number, words) = self.status;
        let mut text = format!("HTTP/1.{version} {number} {words}\r\nServer: Vesicle\r\n");
        text += if close { "Connection: close\r\n" } else { "Connection: keep-alive\r\n" };
        if let Some((name, value)) = &self.header {
            text += &format!("{name}: {value}\r\n");
        }
        text += &format!("Content-Type: {}\r\nContent-Length: {}\r\n\r\n", self.content_type, self.body.len());
        let mut bytes = text.into_bytes();
        if with_body {
            bytes.extend_from_slice(self.body.as_bytes());
        }
        bytes
    }
}

/// A request whose head is complete.
struct Request<'a> {
    method: &'a str,
    target: &'a str,
    version: u8,
    headers: &'a [Header<'a>],
}

impl<'a> Request<'a> {
    /// The first header field of one of these names, in any letter case; its name as it was sent.
    fn header(&self, names: &[&str]) -> Option<(&'a str, &'a str)> {
        let header = self.headers.iter().find(|header| names.iter().any(|name| name.eq_ignore_ascii_case(header.name)));
        header.map(|header| (header.name, std::str::from_utf8(header.value).unwrap_or_default().trim()))
    }

    /// The path; of a target in absolute form what follows the host (RFC 9112 §3.2).
    fn path(&self) -> &'a str {
        if self.target.starts_with('/') {
            return self.target;
        }
        let host = self.target.strip_prefix("http://").unwrap_or_default();
        host.find('/').map_or("", |start| &host[start..])
    }

    fn closes(&self) -> bool {
        let said = |word: &str| {
            let (_, value) = self.header(&["Connection"]).unwrap_or_default();
            value.split(',').any(|option| option.trim().eq_ignore_ascii_case(word))
        };
        if self.version == 0 { !said("keep-alive") } else { said("close") }
    }

    /// Bytes of the body, which is not looked at.
    fn body_length(&self) -> Result<usize, Response> {
        if let Some((name, value)) = self.header(&["Transfer-Encoding"]) {
            let text = format!("Invalid header. Reason: Unsupported value. Key:{name}; Value:{value}");
            return Err(Response::refusal((501, "Not Implemented"), text));
        }
        let Some((name, value)) = self.header(&["Content-Length"]) else { return Ok(0) };
        value.parse().map_err(|_| invalid_value(name, value))
    }

    /// Whether the guest prefers JSON to text.
    fn wants_json(&self) -> bool {
        let (_, value) = self.header(&["Accept"]).unwrap_or_default();
        let media = |range: &str| range.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case(JSON));
        value.split(',').any(media)
    }
}

fn invalid_value(name: &str, value: &str) -> Response {
    Response::bad_request(format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}"))
}

/// Answers the request that `received` begins with at `now`, on the tokens' clock; `None` if more of
/// it has to come. The buffer that holds it need not be larger than [`MAX_REQUEST`].
pub fn answer(received: &[u8], mmds: &mut Mmds, now: Duration) -> Option<Answer> {
    if received.is_empty() {
        return None;
    }
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let head = match parsed.parse(received) {
        Ok(Status::Complete(head)) => head,
        Ok(Status::Partial) if received.len() < MAX_REQUEST => return None,
        Ok(Status::Partial) => return Some(broken(received, "The request is too long.")),
        Err(error) => return Some(broken(received, &format!("Invalid request: {error}."))),
    };
    let (Some(method), Some(target), Some(version)) = (parsed.method, parsed.path, parsed.version) else {
        return Some(broken(received, "Invalid request."));
    };
    let request = Request { method, target, version, headers: parsed.headers };
    let (consumed, response, close) = match request.body_length() {
        // Where the next request begins cannot be known.
        Err(response) => (received.len(), response, true),
        Ok(body) if body > MAX_REQUEST - head.min(MAX_REQUEST) => {
            (received.len(), Response::bad_request("The request is too long."), true)
        }
        Ok(body) if received.len() < head + body => return None,
        Ok(body) => (head + body, respond(&request, mmds, now), request.closes()),
    };
    Some(Answer { consumed, bytes: response.bytes(version, close, method != "HEAD"), close })
}

/// The answer to what cannot be read: it ends the connection.
fn broken(received: &[u8], text: &str) -> Answer {
    Answer { consumed: received.len(), bytes: Response::bad_request(text).bytes(1, true, true), close: true }
}

fn respond(request: &Request<'_>, mmds: &mut Mmds, now: Duration) -> Response {
    if request.path().is_empty() {
        return Response::bad_request("Invalid URI.");
    }
    match request.method {
        "GET" => get(request, mmds, now),
        "PUT" => put(request, mmds, now),
        _ => Response {
            header: Some(("Allow".into(), "GET, PUT".into())),
            ..Response::refusal((405, "Method Not Allowed"), "Not allowed HTTP method.")
        },
    }
}

fn get(request: &Request<'_>, mmds: &Mmds, now: Duration) -> Response {
    const UNAUTHORIZED: (u16, &str) = (401, "Unauthorized");
    // Without a session version 1 answers all the same; that it had none is counted.
    let refusal = match request.header(&TOKEN) {
        Some((_, token)) if mmds.tokens.is_valid(token, now) => None,
        Some(_) => {
            METRICS.mmds.rx_invalid_token.inc();
            Some("MMDS token not valid.")
        }
        None => {
            METRICS.mmds.rx_no_token.inc();
            Some(
                "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the \
                 session token.",
            )
        }
    };
    if let (MmdsVersion::V2, Some(text)) = (mmds.version, refusal) {
        return Response::refusal(UNAUTHORIZED, text);
    }
    let json = request.wants_json() && !mmds.imds_compat;
    let (format, content_type) = if json { (Format::Json, JSON) } else { (Format::Text, TEXT) };
    match mmds.store.get(request.path(), format) {
        Ok(body) => Response::ok(content_type, body),
        Err(LookupError::NotFound) => not_found(request.path()),
        Err(error @ LookupError::UnsupportedValueType) => {
            Response::refusal((501, "Not Implemented"), error.to_string())
        }
    }
}

fn put(request: &Request<'_>, mmds: &mut Mmds, now: Duration) -> Response {
    // Who asks through a proxy is not who the token would be for.
    if let Some((name, _)) = request.header(&FORWARDED) {
        return Response::bad_request(format!("Invalid header. Reason: Unsupported header name. Key: {name}"));
    }
    if collapse_slashes(request.path()) != TOKEN_PATH {
        return not_found(request.path());
    }
    let Some((name, value)) = request.header(&TTL) else {
        return Response::bad_request(
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
             `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
        );
    };
    let Ok(ttl) = value.parse() else { return invalid_value(name, value) };
    match mmds.tokens.issue(ttl, now) {
        Ok(token) => Response { header: Some((name.to_owned(), ttl.to_string())), ..Response::ok(TEXT, token) },
        Err(error) => Response::bad_request(error.to_string()),
    }
}

fn not_found(path: &str) -> Response {
    Response::refusal((404, "Not Found"), format!("Resource not found: {path}."))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: Duration = Duration::from_secs(5);

    fn mmds(version: MmdsVersion) -> Mmds {
        let mut mmds = Mmds::new(51_200);
        mmds.version = version;
        mmds.store.put(json!({"name": {"first": "John", "empty": ""}, "age": 43})).unwrap();
        mmds
    }

    /// Status, head and body of the answer to a whole request.
    fn ask_at(mmds: &mut Mmds, request: &str, now: Duration) -> (u16, String, String) {
        let answer = answer(request.as_bytes(), mmds, now).unwrap();
        assert_eq!(answer.consumed, request.len());
        let text = String::from_utf8(answer.bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
        assert_eq!(answer.close, head.contains("Connection: close"), "{head}");
        (head[9..12].parse().unwrap(), head.to_owned(), body.to_owned())
    }

    fn ask(mmds: &mut Mmds, request: &str) -> (u16, String) {
        let (status, _, body) = ask_at(mmds, request, NOW);
        (status, body)
    }

    fn get_with(mmds: &mut Mmds, path: &str, headers: &str) -> (u16, String) {
        ask(mmds, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"))
    }

    fn token(mmds: &mut Mmds, ttl: u32) -> String {
        let (status, body) =
            ask(mmds, &format!("PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: {ttl}\r\n\r\n"));
        assert_eq!(status, 200, "{body}");
        body
    }

    #[test]
    fn version_1_answers_with_and_without_a_token() {
        let mut mmds = mmds(MmdsVersion::V1);
        for headers in ["", "X-metadata-token: nonsense\r\n", "X-Forwarded-For: 1.2.3.4\r\n"] {
            assert_eq!(get_with(&mut mmds, "/name/first", headers), (200, "John".into()));
        }
        let token = token(&mut mmds, 60);
        assert_eq!(get_with(&mut mmds, "/name/first", &format!("X-metadata-token: {token}\r\n")).0, 200);
        assert_eq!(get_with(&mut mmds, "/nope", ""), (404, "Resource not found: /nope.".into()));
        let unsupported = "Cannot retrieve value. The value has an unsupported type.";
        assert_eq!(get_with(&mut mmds, "/age", ""), (501, unsupported.into()));
    }

    #[test]
    fn version_2_wants_a_token_that_is_its_own_and_has_not_expired() {
        let mut mmds = mmds(MmdsVersion::V2);
        let (status, body) = get_with(&mut mmds, "/name", "");
        assert!(status == 401 && body.starts_with("No MMDS token provided."), "{body}");
        let refused = (401, "MMDS token not valid.".to_owned());
        assert_eq!(get_with(&mut mmds, "/name", "X-metadata-token: nonsense\r\n"), refused);
        let token = token(&mut mmds, 2);
        for name in ["X-metadata-token", "x-METADATA-token", "X-aws-ec2-metadata-token", "x-aws-ec2-metadata-TOKEN"] {
            let request = format!("GET /name HTTP/1.1\r\n{name}: {token}\r\n\r\n");
            let at = |mmds: &mut Mmds, seconds| ask_at(mmds, &request, Duration::from_secs(seconds));
            assert_eq!(at(&mut mmds, 6).0, 200);
            let (status, _, body) = at(&mut mmds, 7);
            assert_eq!((status, body), refused, "expired");
        }
    }

    #[test]
    fn a_token_is_issued_under_either_name_and_the_lifetime_said_back() {
        let mut mmds = mmds(MmdsVersion::V2);
        for name in TTL.iter().flat_map(|name| [(*name).to_owned(), name.to_uppercase()]) {
            let request = format!("PUT http://169.254.169.254//latest/api//token HTTP/1.1\r\n{name}: 21600\r\n\r\n");
            let (status, head, body) = ask_at(&mut mmds, &request, NOW);
            assert_eq!((status, body.len()), (200, 64));
            assert!(head.contains(&format!("{name}: 21600\r\nContent-Type: text/plain")), "{head}");
        }
        for (headers, expected) in [
            ("", "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or"),
            ("X-metadata-token-ttl-seconds: 0\r\n", "Invalid time to live value provided for token: 0."),
            ("X-metadata-token-ttl-seconds: 21601\r\n", "Please provide a value between 1 and 21600."),
            ("X-metadata-token-ttl-seconds: -1\r\n", "Key:X-metadata-token-ttl-seconds; Value:-1"),
            ("X-metadata-token-ttl-seconds:\r\n", "Invalid header. Reason: Invalid value."),
            ("X-metadata-token-ttl-seconds: 99999999999\r\n", "Invalid header. Reason: Invalid value."),
        ] {
            let (status, body) = ask(&mut mmds, &format!("PUT /latest/api/token HTTP/1.1\r\n{headers}\r\n"));
            assert!(status == 400 && body.contains(expected), "{headers}: {body}");
        }
        let (status, body) = ask(&mut mmds, "PUT /token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n");
        assert_eq!((status, body), (404, "Resource not found: /token.".into()));
    }

    #[test]
    fn a_forwarded_request_gets_no_token_in_any_letter_case() {
        let mut mmds = mmds(MmdsVersion::V2);
        for name in ["X-Forwarded-For", "x-forwarded-for", "X-FORWARDED-FOR", "x-fOrWaRdEd-FoR"] {
            let request = format!(
                "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n{name}: 1.2.3.4\r\n\r\n"
            );
            let expected = format!("Invalid header. Reason: Unsupported header name. Key: {name}");
            assert_eq!(ask(&mut mmds, &request), (400, expected));
        }
    }

    #[test]
    fn the_guest_chooses_json_or_text_unless_it_must_be_text() {
        let mut mmds = mmds(MmdsVersion::V1);
        for (accept, json) in [
            ("application/json", true),
            ("Application/JSON; q=0.9", true),
            ("text/html, application/json", true),
            ("text/plain", false),
            ("*/*", false),
            ("", false),
        ] {
            let request = format!("GET /name/ HTTP/1.1\r\naccept: {accept}\r\n\r\n");
            let (status, head, body) = ask_at(&mut mmds, &request, NOW);
            let expected = if json { "{\"empty\":\"\",\"first\":\"John\"}" } else { "empty\nfirst" };
            assert_eq!((status, body.as_str()), (200, expected), "{accept}");
            assert_eq!(head.contains("Content-Type: application/json"), json);
        }
        mmds.imds_compat = true;
        let (_, head, body) = ask_at(&mut mmds, "GET /name HTTP/1.1\r\nAccept: application/json\r\n\r\n", NOW);
        assert!(head.contains("Content-Type: text/plain") && body == "empty\nfirst");
    }

    #[test]
    fn an_empty_value_is_an_answer_of_no_bytes() {
        let mut mmds = mmds(MmdsVersion::V1);
        let (status, head, body) = ask_at(&mut mmds, "GET /name/empty HTTP/1.1\r\n\r\n", NOW);
        assert_eq!((status, body.as_str()), (200, ""));
        assert!(head.ends_with("Content-Length: 0"));
    }

    #[test]
    fn other_methods_and_targets_are_refused() {
        let mut mmds = mmds(MmdsVersion::V2);
        for method in ["POST", "PATCH", "DELETE", "OPTIONS"] {
            let (status, head, body) = ask_at(&mut mmds, &format!("{method} / HTTP/1.1\r\n\r\n"), NOW);
            assert_eq!((status, body.as_str()), (405, "Not allowed HTTP method."));
            assert!(head.contains("Allow: GET, PUT"));
        }
        let head = answer(b"HEAD / HTTP/1.1\r\n\r\n", &mut mmds, NOW).unwrap().bytes;
        assert!(head.starts_with(b"HTTP/1.1 405") && head.ends_with(b"\r\n\r\n"), "a HEAD has no body");
        for target in ["http://", "http://169.254.169.254", "*", "name"] {
            assert_eq!(get_with(&mut mmds, target, ""), (400, "Invalid URI.".into()), "{target}");
        }
    }

    #[test]
    fn a_connection_stays_as_long_as_the_guest_wants_it() {
        let mut mmds = mmds(MmdsVersion::V1);
        for (version, header, close) in [
            (1, "", false),
            (1, "Connection: close\r\n", true),
            (1, "connection: Upgrade, Close\r\n", true),
            (0, "", true),
            (0, "Connection: keep-alive\r\n", false),
        ] {
            let request = format!("GET / HTTP/1.{version}\r\n{header}\r\n");
            let answer = answer(request.as_bytes(), &mut mmds, NOW).unwrap();
            assert_eq!(answer.close, close, "{request}");
            assert!(answer.bytes.starts_with(format!("HTTP/1.{version} 200 OK\r\n").as_bytes()));
        }
    }

    #[test]
    fn a_request_is_answered_once_it_is_whole_and_the_next_left_alone() {
        let mut mmds = mmds(MmdsVersion::V1);
        let first = b"GET /name/first HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello";
        for end in 0..first.len() {
            assert_eq!(answer(&first[..end], &mut mmds, NOW), None);
        }
        let both = [&first[..], b"GET /age HTTP/1.1\r\n"].concat();
        assert_eq!(answer(&both, &mut mmds, NOW).unwrap().consumed, first.len());
    }

    #[test]
    fn what_is_too_long_or_no_http_ends_the_connection() {
        let mut mmds = mmds(MmdsVersion::V1);
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(MAX_REQUEST));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        for request in [
            &long[..MAX_REQUEST],
            &many,
            "\u{16}\u{3}\u{1}",
            "GET / HTTP/2.0\r\n\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 4097\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
            "GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        ] {
            let answer = answer(request.as_bytes(), &mut mmds, NOW).unwrap();
            assert!(answer.close && answer.consumed == request.len());
            assert!(answer.bytes.starts_with(b"HTTP/1.1 400 Bad Request"), "{request}");
        }
        let chunked = b"PUT /latest/api/token HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert!(answer(chunked, &mut mmds, NOW).unwrap().bytes.starts_with(b"HTTP/1.1 501 Not Implemented"));
    }
}
