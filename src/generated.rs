//! Properties that must hold for anything a guest, a client or a file may say: tests, and what a fuzzer runs.

use proptest::prelude::{Just, Strategy, any};
use proptest::sample::{Index, select};
use proptest::test_runner::Config;

/// As many generated inputs as `PROPTEST_CASES` says (see tools/fuzz), or else `usual` ones.
pub fn inputs(usual: u32) -> Config {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => Config::default(),
        None => Config { cases: usual, ..Config::default() },
    }
}

/// A change to bytes: some of them give way to others.
#[derive(Debug, Clone)]
pub struct Change {
    at: Index,
    length: usize,
    by: By,
}

#[derive(Debug, Clone)]
enum By {
    These(Vec<u8>),
    /// So many from there.
    Own(Index, usize),
}

/// What makes of something valid what is nearly valid, so that it comes further than any bytes would.
pub fn changes() -> impl Strategy<Value = Vec<Change>> {
    let numbers = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, (1 << 31) - 1, 1 << 31, u32::MAX.into(), 1 << 32];
    let number = select([&numbers[..], &[i64::MAX as u64, 1 << 63, u64::MAX - 1, u64::MAX]].concat());
    let words = ["-1", "1e999", "18446744073709551616", "null", "\"\"", "\\u0000", "{", "[", "]", ",", "\r\n", "\0"];
    let change = prop_oneof![
        4 => any::<u8>().prop_map(|byte| (1, By::These(vec![byte]))),
        3 => (number.clone(), select(vec![1, 2, 4, 8]))
            .prop_map(|(number, width)| (width, By::These(number.to_le_bytes()[..width].to_vec()))),
        2 => (number, 1..4usize).prop_map(|(number, length)| (length, By::These(postcard::to_allocvec(&number).unwrap()))),
        1 => (0..9usize, select(words.to_vec())).prop_map(|(length, word)| (length, By::These(word.into()))),
        1 => (1..17usize).prop_map(|length| (length, By::These(vec![]))),
        1 => (0..17usize, any::<Index>(), 1..65usize).prop_map(|(length, from, count)| (length, By::Own(from, count))),
        1 => Just((usize::MAX, By::These(vec![]))),
    ];
    let change = (any::<Index>(), change).prop_map(|(at, (length, by))| Change { at, length, by });
    proptest::collection::vec(change, 0..6)
}

/// Makes `changes` to `bytes`, one after the other.
pub fn change(bytes: &mut Vec<u8>, changes: &[Change]) {
    for Change { at, length, by } in changes {
        let range = |at: &Index, length: usize| {
            let at = at.index(bytes.len() + 1);
            at..at.saturating_add(length).min(bytes.len())
        };
        let by = match by {
            By::These(these) => these.clone(),
            By::Own(from, count) => bytes[range(from, *count)].to_vec(),
        };
        bytes.splice(range(at, *length), by);
    }
}

/// As `proptest!`, but where a fuzzer is built each property is a function of the bytes that its inputs are drawn from.
macro_rules! properties {
    (#![proptest_config($config:expr)]
     $($(#[$meta:meta])* fn $name:ident($($input:pat in $strategy:expr),+ $(,)?) $body:block)+) => {
        #[cfg(not(fuzzing))]
        proptest::proptest! {
            #![proptest_config($config)]
            $($(#[$meta])* fn $name($($input in $strategy),+) $body)+
        }
        $(
            #[cfg(fuzzing)]
            pub(crate) fn $name(bytes: &[u8]) {
                let ($($input,)+) = crate::generated::drawn(&($($strategy,)+), bytes);
                let holds = || -> Result<(), proptest::test_runner::TestCaseError> {
                    $body
                    Ok(())
                };
                holds().unwrap();
            }
        )+
    };
    ($($properties:tt)+) => {
        crate::generated::properties! {
            #![proptest_config(proptest::test_runner::Config::default())]
            $($properties)+
        }
    };
}

pub(crate) use properties;
#[cfg(not(fuzzing))]
pub(crate) use proptest::prop_oneof;

#[cfg(fuzzing)]
pub(crate) use self::from_bytes::{drawn, prop_oneof};

#[cfg(fuzzing)]
pub(crate) mod from_bytes {
    use std::fmt::Debug;
    use std::sync::LazyLock;

    use proptest::strategy::{BoxedStrategy, NewTree, Strategy, ValueTree};
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

    /// Follows the bytes of a fuzzer. Proptest would go on with zeroes, which it rejects for ever where a number is
    /// drawn from a range; this is more than any property takes.
    static REST: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..1u32 << 16).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect());

    /// What the bytes stand for.
    pub fn drawn<S: Strategy>(strategies: &S, bytes: &[u8]) -> S::Value {
        let rng = TestRng::from_seed(RngAlgorithm::PassThrough, &[bytes, &REST].concat());
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let inputs = strategies.new_tree(&mut runner).unwrap().current();
        if std::env::var_os("VESICLE_FUZZ_SHOW").is_some() {
            eprintln!("{inputs:?}");
        }
        inputs
    }

    /// One of several strategies. Proptest's own sets half of the bytes aside for each option before the one it takes,
    /// to make the input smaller with: after a few choices none would be left.
    #[derive(Debug)]
    pub struct OneOf<T: Debug>(pub Vec<BoxedStrategy<T>>);

    impl<T: Debug> Strategy for OneOf<T> {
        type Tree = Box<dyn ValueTree<Value = T>>;
        type Value = T;

        fn new_tree(&self, runner: &mut TestRunner) -> NewTree<Self> {
            let pick = (0..self.0.len() as u32).new_tree(runner)?.current();
            self.0[pick as usize].new_tree(runner)
        }
    }

    /// As proptest's.
    macro_rules! prop_oneof {
        ($($weight:expr => $option:expr),+ $(,)?) => {
            crate::generated::from_bytes::OneOf(
                [$(vec![proptest::strategy::Strategy::boxed($option); $weight]),+].concat(),
            )
        };
        ($($option:expr),+ $(,)?) => {
            crate::generated::prop_oneof![$(1 => $option),+]
        };
    }

    pub(crate) use prop_oneof;
}
