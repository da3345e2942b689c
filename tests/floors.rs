//! The shape of the library, read from its source: which floor may import which, where `unsafe`
//! and memory orderings may be written, and what public signatures may not hold.
//!
//! Each rule has a test on the real tree here, and tests on seeded bad snippets beside the rule.
//! design/checking.md says what this does not see.

#[path = "floors/fences.rs"]
mod fences;
#[path = "floors/imports.rs"]
mod imports;
#[path = "floors/lex.rs"]
mod lex;
#[path = "floors/signatures.rs"]
mod signatures;

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use lex::Source;

/// A file longer than this has more than one idea in it.
const MAX_LINES: usize = 600;

/// Where a top-level module stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Imports its own floor and those below.
    Floor(u8),
    /// Imports everything; imported by nobody but lib.rs.
    Side,
}

/// Every top-level module of the library.
const PLACES: &[(&str, Place)] = &[
    ("addr", Place::Floor(0)),
    ("range", Place::Floor(0)),
    ("geometry", Place::Floor(0)),
    ("error", Place::Floor(0)),
    ("identity", Place::Floor(0)),
    ("failpoint", Place::Floor(0)),
    ("sync", Place::Floor(1)),
    ("backing", Place::Floor(1)),
    ("os", Place::Floor(1)),
    ("state", Place::Floor(2)),
    ("folio", Place::Floor(3)),
    ("stage2", Place::Floor(4)),
    ("gmem", Place::Floor(5)),
    ("hyp", Place::Floor(6)),
    ("vm_memory", Place::Floor(7)),
    ("render", Place::Floor(7)),
    ("audit", Place::Side),
    ("oracle", Place::Side),
];

fn place(module: &str) -> Option<Place> {
    PLACES.iter().find(|(name, _)| *name == module).map(|&(_, place)| place)
}

/// One breach of one rule.
#[derive(Debug, PartialEq, Eq)]
struct Breach {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src/{}:{}: {}", self.file, self.line, self.what)
    }
}

fn known(source: &Source) -> Vec<Breach> {
    match source.top_module() {
        None => Vec::new(),
        Some(top) if place(top).is_some() => Vec::new(),
        Some(top) => {
            let what = format!("`{top}` has no floor: add it to PLACES in tests/floors.rs");
            vec![source.breach(1, what)]
        }
    }
}

fn length(source: &Source) -> Vec<Breach> {
    let lines = source.nr_lines();
    if lines <= MAX_LINES {
        return Vec::new();
    }
    vec![source.breach(lines, format!("{lines} lines; split it, {MAX_LINES} is the limit"))]
}

/// Words that name a hypervisor.
const HYPERVISORS: [&str; 2] = ["pkvm", "gunyah"];

/// A hypervisor is named in `hyp` and nowhere else.
fn names(source: &Source, text: &str) -> Vec<Breach> {
    if source.name().starts_with("hyp/") {
        return Vec::new();
    }
    let mut breaches = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.to_ascii_lowercase();
        for name in HYPERVISORS.into_iter().filter(|name| line.contains(name)) {
            breaches.push(source.breach(at + 1, format!("names {name}; that is for hyp/")));
        }
    }
    breaches
}

/// Every file below a folder of the repository, as its name from there and its text.
fn texts(folder: &str) -> io::Result<Vec<(String, String)>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut texts = Vec::new();
    let mut open = vec![root.clone()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(&root).unwrap_or(&path).display().to_string();
                texts.push((name, fs::read_to_string(&path)?));
            }
        }
    }
    texts.sort();
    Ok(texts)
}

/// All of `src`, parsed.
fn tree() -> io::Result<Vec<Source>> {
    let texts = texts("src")?.into_iter().filter(|(name, _)| name.ends_with(".rs"));
    Ok(texts.map(|(name, text)| Source::new(&name, &text)).collect())
}

#[cfg(test)]
mod the_library {
    use super::*;

    /// Fails with every breach, not only the first.
    fn obeys(rule: impl Fn(&Source) -> Vec<Breach>) {
        let sources = tree().expect("src can be read");
        assert!(sources.iter().any(|source| source.name() == "lib.rs"), "this is not the library");
        let breaches: Vec<_> = sources.iter().flat_map(rule).map(|b| b.to_string()).collect();
        assert!(breaches.is_empty(), "\n{}\n", breaches.join("\n"));
    }

    #[test]
    fn has_only_files_that_stand_on_a_floor() {
        obeys(known);
    }

    #[test]
    fn has_no_long_files() {
        obeys(length);
    }

    #[test]
    fn imports_downwards_only() {
        obeys(imports::upward);
    }

    #[test]
    fn writes_unsafe_in_fenced_files_only() {
        obeys(fences::unsafe_code);
    }

    #[test]
    fn writes_orderings_where_an_atomic_lives_and_names_their_partners() {
        obeys(fences::orderings);
    }

    #[test]
    fn has_no_bare_numbers_in_public_signatures() {
        obeys(signatures::bare);
    }

    #[test]
    fn names_no_hypervisor_but_where_they_are() {
        for folder in ["src", "examples"] {
            let texts = texts(folder).expect("it can be read");
            assert!(texts.len() > 5, "{folder} is not what it was");
            let of = |(name, text): &(String, String)| names(&Source::new(name, ""), text);
            let breaches: Vec<_> = texts.iter().flat_map(of).map(|it| it.to_string()).collect();
            assert!(breaches.is_empty(), "in {folder}\n{}\n", breaches.join("\n"));
        }
        // The rule is about something.
        let sources = tree().expect("src can be read");
        for name in HYPERVISORS {
            let file = format!("hyp/{name}/mod.rs");
            assert!(sources.iter().any(|source| source.name() == file), "{file}");
        }
    }

    #[test]
    fn has_no_stale_exception() {
        let sources = tree().expect("src can be read");
        assert_eq!(signatures::stale(&sources), Vec::<String>::new());
    }
}

#[cfg(test)]
mod seeded {
    use super::*;

    #[test]
    fn a_file_without_a_floor_is_seen() {
        assert_eq!(known(&Source::new("utils.rs", "")).len(), 1);
        assert_eq!(known(&Source::new("utils/mod.rs", "")).len(), 1);
        assert_eq!(known(&Source::new("state/cell.rs", "")).len(), 0);
        assert_eq!(known(&Source::new("lib.rs", "")).len(), 0);
    }

    #[test]
    fn a_hypervisor_that_is_named_is_seen() {
        let seen = |file: &str, text: &str| names(&Source::new(file, ""), text).len();
        assert_eq!(seen("lib.rs", "//! After PKvM's example."), 1);
        assert_eq!(seen("vmm/args.rs", "\nlet it = \"gunyah\";\nfn of_pkvm() {} // or Gunyah"), 3);
        assert_eq!(seen("hyp.rs", "mod pkvm;"), 1);
        assert_eq!(seen("hyp/model.rs", "pkvm and Gunyah"), 0);
        assert_eq!(seen("stage2/mod.rs", "KVM, or any hypervisor"), 0);
    }

    #[test]
    fn a_long_file_is_seen() {
        assert_eq!(length(&Source::new("addr.rs", &"\n".repeat(MAX_LINES + 1))).len(), 1);
        assert_eq!(length(&Source::new("addr.rs", &"\n".repeat(MAX_LINES))).len(), 0);
    }
}
