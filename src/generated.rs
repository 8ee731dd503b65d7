//! How much the properties are tried that must hold for anything a guest, a client or a file may say.

use proptest::test_runner::Config;

/// As many generated inputs as `PROPTEST_CASES` says (see tools/fuzz), or else `usual` ones.
pub fn inputs(usual: u32) -> Config {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => Config::default(),
        None => Config { cases: usual, ..Config::default() },
    }
}
