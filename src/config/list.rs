//! Lists in a file that may be anything.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// For serde: a list of at most `N` entries. A byte of a file may stand for one of thousands.
pub fn at_most<'de, T: Deserialize<'de>, D: Deserializer<'de>, const N: usize>(list: D) -> Result<Vec<T>, D::Error> {
    struct AtMost<T, const N: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for AtMost<T, N> {
        type Value = Vec<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "at most {N} of them")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = list.next_element()? {
                if entries.len() == N {
                    return Err(A::Error::invalid_length(N + 1, &self));
                }
                entries.push(entry);
            }
            Ok(entries)
        }
    }
    list.deserialize_seq(AtMost::<T, N>(PhantomData))
}
