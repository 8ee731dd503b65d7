//! The rules of the house, read off the sources: which module may use which, and what an arrow
//! must not point at.

#![expect(clippy::expect_used, reason = "a test ends where it finds something wrong")]

use std::fs;
use std::path::{Path, PathBuf};

/// A module and the modules of this crate that it may name. Anything may name `config`, `metrics`
/// and `log`, which name nothing but each other.
const MAY_USE: &[(&str, &[&str])] = &[
    ("config", &[]),
    ("metrics", &[]),
    ("log", &[]),
    ("heap", &[]),
    ("random", &[]),
    ("os", &[]),
    ("generated", &[]),
    ("fuzzing", &["api", "boot", "devices", "machine", "mmds", "snapshot"]),
    ("sandbox", &[]),
    ("signals", &["sandbox"]),
    ("socket", &[]),
    ("event_loop", &[]),
    ("memory", &[]),
    ("mmds", &[]),
    ("boot", &["memory"]),
    ("devices", &["memory", "mmds"]),
    ("kvm", &["boot", "memory"]),
    ("snapshot", &["memory"]),
    (
        "machine",
        &[
            "boot",
            "control",
            "devices",
            "event_loop",
            "kvm",
            "memory",
            "mmds",
            "sandbox",
            "signals",
            "snapshot",
            "socket",
        ],
    ),
    ("control", &[]),
    ("api", &["control"]),
    ("cli", &["api", "snapshot"]),
];
const EVERYBODYS: &[&str] = &["os", "random", "generated", "config", "metrics", "log", "warn_limited"];

fn sources(at: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(at).expect("a source directory").map(|entry| entry.expect("an entry").path()) {
        if entry.is_dir() {
            sources(&entry, found);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            found.push(entry);
        }
    }
}

fn read_sources() -> Vec<(String, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    sources(&src, &mut found);
    let name = |path: &Path| path.strip_prefix(&src).expect("below src").display().to_string();
    found.iter().map(|path| (name(path), fs::read_to_string(path).expect("a source file"))).collect()
}

/// The first segments of every path that starts with `crate::`, a braced list taken apart.
fn used(text: &str) -> Vec<String> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    let code = code.collect::<Vec<_>>().join("\n");
    let mut modules = Vec::new();
    for path in code.split("crate::").skip(1) {
        let word = |text: &str| text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        match path.strip_prefix('{') {
            Some(list) => modules.extend(list.split(['}', ';']).next().unwrap_or_default().split(',').map(word)),
            None => modules.push(word(path)),
        }
    }
    modules.retain(|module: &String| !module.is_empty());
    modules
}

#[test]
fn dependencies_point_one_way() {
    let mut wrong = Vec::new();
    for (file, text) in read_sources() {
        let module = file.split(['/', '.']).next().unwrap_or_default();
        if matches!(module, "lib" | "main") {
            continue;
        }
        let (_, allowed) =
            MAY_USE.iter().find(|(name, _)| *name == module).unwrap_or_else(|| panic!("{file}: no rule"));
        for other in used(&text) {
            if other != module && !allowed.contains(&other.as_str()) && !EVERYBODYS.contains(&other.as_str()) {
                wrong.push(format!("{file} uses {other}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn wire_types_import_nothing_of_ours() {
    let mut types = read_sources();
    types.retain(|(file, _)| file.starts_with("api/types"));
    assert!(types.len() > 1, "{types:?}");
    for (file, text) in types {
        assert_eq!(used(&text), Vec::<String>::new(), "{file}");
        let outside = if file == "api/types.rs" { "super::" } else { "super::super" };
        assert!(!text.contains(outside), "{file}");
    }
}
