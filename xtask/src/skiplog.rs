//! What tests themselves said that they skipped: the file that tests/common/mod.rs appends to.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub(crate) struct SkipLog {
    path: PathBuf,
}

/// One test that could not run, or one fact about the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Note {
    /// `HAVE`: the host offers this.
    Have { capability: String },
    /// `LACK`: the host does not offer this.
    Lack { capability: String, why: String },
    /// `SKIP`: a test wanted it.
    Skip { capability: String, why: String, test: String },
}

impl SkipLog {
    /// Starts an empty one.
    pub(crate) fn create(path: PathBuf) -> Result<Self, String> {
        fs::write(&path, "").map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn read(&self) -> Result<BTreeSet<Note>, String> {
        let text: io::Result<String> = fs::read_to_string(&self.path);
        parse(&text.map_err(|e| format!("{}: {e}", self.path.display()))?)
    }

    /// How many tests skipped so far.
    pub(crate) fn skipped_tests(&self) -> Result<u64, String> {
        Ok(skipped_tests(&self.read()?).len() as u64)
    }

    /// Whether a test found that the host lacks this, and why.
    pub(crate) fn lacks(&self, wanted: &str) -> Option<String> {
        self.read().ok()?.into_iter().find_map(|note| match note {
            Note::Lack { capability, why } if capability == wanted => Some(why),
            _ => None,
        })
    }
}

/// A test that wants two things is one test.
pub(crate) fn skipped_tests(notes: &BTreeSet<Note>) -> BTreeSet<&str> {
    notes
        .iter()
        .filter_map(|note| match note {
            Note::Skip { test, .. } => Some(test.as_str()),
            Note::Have { .. } | Note::Lack { .. } => None,
        })
        .collect()
}

/// Lines of tab-separated fields. Repetitions are one note.
fn parse(text: &str) -> Result<BTreeSet<Note>, String> {
    text.lines().map(parse_line).collect()
}

fn parse_line(line: &str) -> Result<Note, String> {
    let fields: Vec<_> = line.split('\t').map(String::from).collect();
    match fields.as_slice() {
        [word, capability] if word == "HAVE" => Ok(Note::Have { capability: capability.clone() }),
        [word, capability, why] if word == "LACK" => {
            Ok(Note::Lack { capability: capability.clone(), why: why.clone() })
        }
        [word, capability, why, test] if word == "SKIP" => {
            Ok(Note::Skip { capability: capability.clone(), why: why.clone(), test: test.clone() })
        }
        _ => Err(format!("the skip log has a line that nobody understands: {line:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_read_once_each() {
        let notes = parse(
            "HAVE\tuffd\nSKIP\tkvm\tno such file\tview::maps\nSKIP\tthp\tnever\tview::maps\n\
             SKIP\tkvm\tno such file\tview::maps\nLACK\tkvm\tno such file\n",
        )
        .expect("a valid log");
        assert_eq!(notes.len(), 4);
        assert_eq!(skipped_tests(&notes), BTreeSet::from(["view::maps"]));
    }

    #[test]
    fn a_broken_line_is_not_overlooked() {
        for bad in ["SKIP", "SKIP\tkvm\twhy", "MAYBE\tkvm", "HAVE\tkvm\twhy"] {
            assert!(parse(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
