//! Session tokens: what a guest shows to read the document under version 2.
//!
//! A token says itself until when it is valid, and is signed with a key that only this process
//! has. Nothing is remembered of those that were issued, so a guest may ask for any number.

use std::hash::Hasher;
use std::io;
use std::time::Duration;

use siphasher::sip128::{Hasher128, SipHasher24};

use crate::random;

/// Shortest and longest life of a token in seconds.
pub const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21_600;

/// Characters of a token: two words of 64 bits and a tag of 128, in hexadecimal.
const LENGTH: usize = 64;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Outside of [`TTL_SECONDS`].
    #[error(
        "Invalid time to live value provided for token: {0}. Please provide a value between {min} and {max}.",
        min = TTL_SECONDS.start(),
        max = TTL_SECONDS.end()
    )]
    Ttl(u32),
    /// The host gave no random key.
    #[error("There is no key to sign tokens with")]
    Key(#[source] io::Error),
}

/// Issues tokens and knows its own.
#[derive(Default)]
pub struct Tokens {
    /// `None` until the first token.
    key: Option<[u8; 16]>,
    issued: u64,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tokens").field("issued", &self.issued).finish_non_exhaustive()
    }
}

impl Tokens {
    /// A token that is valid for `ttl` seconds from `now`, on the caller's clock.
    ///
    /// # Errors
    /// A lifetime that is not allowed.
    pub fn issue(&mut self, ttl: u32, now: Duration) -> Result<String, TokenError> {
        if !TTL_SECONDS.contains(&ttl) {
            return Err(TokenError::Ttl(ttl));
        }
        let key = match self.key {
            Some(key) => key,
            None => *self.key.insert(random::bytes().map_err(TokenError::Key)?),
        };
        self.issued = self.issued.wrapping_add(1);
        let expires = milliseconds(now.saturating_add(Duration::from_secs(ttl.into())));
        let tag = sign(key, expires, self.issued);
        Ok(format!("{expires:016x}{:016x}{tag:032x}", self.issued))
    }

    /// Whether `token` came from here and has not expired.
    pub fn is_valid(&self, token: &str, now: Duration) -> bool {
        let Some(key) = self.key else { return false };
        if token.len() != LENGTH || !token.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return false;
        }
        let word = |at: usize| u64::from_str_radix(&token[at..at + 16], 16).unwrap_or(0);
        let (expires, serial) = (word(0), word(16));
        let tag = u128::from(word(32)) << 64 | u128::from(word(48));
        // The comparison of two integers takes the same time wherever they differ.
        sign(key, expires, serial) == tag && milliseconds(now) < expires
    }
}

/// SipHash-2-4 with 128 bits of key and tag: made for authenticating short messages.
fn sign(key: [u8; 16], expires: u64, serial: u64) -> u128 {
    let mut hasher = SipHasher24::new_with_key(&key);
    hasher.write_u64(expires);
    hasher.write_u64(serial);
    hasher.finish128().as_u128()
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    #[test]
    fn a_token_is_valid_for_exactly_its_life() {
        let mut tokens = Tokens::default();
        for ttl in [1, 60, 21_600] {
            let token = tokens.issue(ttl, NOW).unwrap();
            let end = NOW + Duration::from_secs(ttl.into());
            assert!(tokens.is_valid(&token, NOW));
            assert!(tokens.is_valid(&token, end - Duration::from_millis(1)));
            assert!(!tokens.is_valid(&token, end));
            assert!(!tokens.is_valid(&token, end + Duration::from_secs(86_400)));
        }
    }

    #[test]
    fn lifetimes_outside_of_one_second_to_six_hours_are_refused() {
        let mut tokens = Tokens::default();
        for ttl in [0, 21_601, u32::MAX] {
            let error = tokens.issue(ttl, NOW).unwrap_err().to_string();
            let expected = format!(
                "Invalid time to live value provided for token: {ttl}. Please provide a value between 1 and 21600."
            );
            assert_eq!(error, expected);
        }
    }

    #[test]
    fn a_changed_a_foreign_and_an_invented_token_are_refused() {
        let (mut tokens, mut others) = (Tokens::default(), Tokens::default());
        assert!(!tokens.is_valid(&"0".repeat(LENGTH), NOW), "before the first one as well");
        let token = tokens.issue(60, NOW).unwrap();
        assert_ne!(token, tokens.issue(60, NOW).unwrap(), "no two are the same");
        assert!(!others.is_valid(&token, NOW));
        others.issue(60, NOW).unwrap();
        assert!(!others.is_valid(&token, NOW));
        for at in 0..LENGTH {
            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            assert!(!tokens.is_valid(std::str::from_utf8(&changed).unwrap(), NOW), "{at}");
        }
        let plus = format!("+{}", &token[1..]);
        for invented in ["", "x", &token[1..], &format!("{token}0"), &plus, &"é".repeat(32), &"f".repeat(LENGTH)] {
            assert!(!tokens.is_valid(invented, NOW), "{invented}");
        }
    }
}
