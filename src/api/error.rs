//! Refusals as the client sees them.

use hyper::StatusCode;

use super::types;
use crate::control::{Gone, Refusal};

/// Longest fault message in bytes: a message may quote what the client sent, but not all of it.
const MAX_MESSAGE: usize = 1024;

/// A status and one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    message: String,
}

impl ApiError {
    /// A refusal.
    pub fn new(status: StatusCode, mut message: String) -> Self {
        if message.len() > MAX_MESSAGE {
            let end = (0..=MAX_MESSAGE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or(0);
            message.truncate(end);
            message.push_str(" …");
        }
        Self { status, message }
    }

    /// 400: what nearly every refusal is.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message.into())
    }

    /// The status of the reply.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body of the reply: `{"fault_message": "…"}`.
    pub fn body(&self) -> Vec<u8> {
        let error = types::Error { fault_message: self.message.clone() };
        // A string always serialises.
        serde_json::to_vec(&error).unwrap_or_default()
    }
}

impl From<Refusal> for ApiError {
    fn from(Refusal(message): Refusal) -> Self {
        Self::bad_request(message)
    }
}

impl From<Gone> for ApiError {
    fn from(gone: Gone) -> Self {
        Self::bad_request(gone.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let error = ApiError::bad_request("é".repeat(MAX_MESSAGE));
        assert!(error.message.len() <= MAX_MESSAGE + " …".len());
        assert!(error.message.ends_with("é …"));
    }

    #[test]
    fn the_body_is_json_whatever_the_message_quotes() {
        let error = ApiError::bad_request("unknown field `a\"\\\n\u{0}`");
        let body: types::Error = serde_json::from_slice(&error.body()).unwrap();
        assert_eq!(body.fault_message, "unknown field `a\"\\\n\u{0}`");
    }
}
