//! Imports go down only.

use super::lex::{Source, closing};
use super::{Breach, Place, place};

/// Every path through `crate::` or up through `super::` that leaves its floor upwards.
///
/// Code for tests is not exempt: a floor that can only be tested with the floors above it does not
/// stand by itself.
pub(crate) fn upward(source: &Source) -> Vec<Breach> {
    let Some(own) = source.top_module() else {
        // lib.rs joins the floors.
        return Vec::new();
    };
    let mut breaches = Vec::new();
    for (line, module) in reached(source) {
        let allowed = match (place(own), place(&module)) {
            _ if module == own => true,
            (Some(Place::Side), Some(Place::Floor(_))) => true,
            (Some(Place::Floor(own)), Some(Place::Floor(other))) => other <= own,
            _ => false,
        };
        if !allowed {
            let what = match place(&module) {
                Some(_) => format!("`{own}` may not import `{module}`: imports go down only"),
                None => format!("`crate::{module}` is no module: name the one that defines it"),
            };
            breaches.push(source.breach(line, what));
        }
    }
    breaches
}

/// The modules below the crate root that the file names, with the line.
fn reached(source: &Source) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, token) in source.tokens().iter().enumerate() {
        let continues = at >= 2 && source.reads(at - 2, &["super", "::"]);
        let mut next = at;
        match token.text.as_str() {
            "crate" if source.reads(at, &["crate", "::"]) => next += 2,
            "super" if !continues => {
                let mut supers = 0;
                while source.reads(next, &["super", "::"]) {
                    supers += 1;
                    next += 2;
                }
                let depth = source.module().len() + token.inline.len();
                // Only a path that climbs to the crate root can leave its floor.
                if supers == 0 || supers < depth {
                    continue;
                }
            }
            _ => continue,
        }
        found.extend(first_names(source, next).into_iter().map(|name| (token.line, name)));
    }
    found
}

/// `a` of `a::b`; `a` and `c` of `{a::b, c::{d, e}}`.
fn first_names(source: &Source, at: usize) -> Vec<String> {
    let tokens = source.tokens();
    let Some(first) = tokens.get(at) else { return Vec::new() };
    if first.text != "{" {
        return vec![first.text.clone()];
    }
    let mut names = Vec::new();
    let end = at + closing(tokens, at);
    let mut next = at + 1;
    let mut wanted = true;
    while next + 1 < end {
        match tokens[next].text.as_str() {
            "{" => {
                next += closing(tokens, next);
                continue;
            }
            "," => wanted = true,
            name if wanted => {
                names.push(name.to_string());
                wanted = false;
            }
            _ => {}
        }
        next += 1;
    }
    names
}

#[cfg(test)]
mod seeded {
    use super::*;

    fn breaches(name: &str, text: &str) -> usize {
        upward(&Source::new(name, text)).len()
    }

    #[test]
    fn upward_imports_are_seen() {
        for (name, text) in [
            ("state/cell.rs", "use crate::folio::FolioPool;"),
            ("addr.rs", "fn f() -> crate::state::Word {}"),
            ("os/mod.rs", "use crate::{addr::Pa, error::{Error, Op}, gmem::GuestMemfd};"),
            ("folio/pool.rs", "pub(crate) use crate::stage2::GuestRun as Run;"),
            ("state/table.rs", "#[cfg(test)] mod tests { use crate::gmem::GuestMemfd; }"),
            ("gmem/pin.rs", "use crate::audit::Audit;"),
            ("audit.rs", "use crate::oracle::Model;"),
            ("state/cell.rs", "use crate::GuestMemfd;"),
            ("state/cell.rs", "macro_rules! m { () => { $crate::gmem::f() } }"),
        ] {
            assert_eq!(breaches(name, text), 1, "{name}: {text}");
        }
    }

    #[test]
    fn climbing_to_the_root_is_an_import() {
        assert_eq!(breaches("addr.rs", "use super::state::Word;"), 1);
        assert_eq!(breaches("state/cell.rs", "use super::super::folio::FolioPool;"), 1);
        let inline = "mod tests { use super::super::super::folio::X; }";
        assert_eq!(breaches("state/cell.rs", inline), 1);
    }

    #[test]
    fn what_goes_down_or_stays_is_fine() {
        for (name, text) in [
            ("gmem/convert.rs", "use crate::{addr::Pa, state::{Word, rules}, stage2::Stage2};"),
            ("state/cell.rs", "use super::word::Word; use crate::state::rules;"),
            ("state/cell.rs", "mod tests { use super::super::word::Word; use super::*; }"),
            ("audit.rs", "use crate::gmem::GuestMemfd;"),
            ("lib.rs", "pub use crate::gmem::GuestMemfd; pub use crate::audit::Audit;"),
            ("addr.rs", "//! [`GuestMemfd`](crate::gmem::GuestMemfd)\npub(crate) fn f() {}"),
            ("addr.rs", "const S: &str = \"use crate::gmem::X;\";"),
            ("addr.rs", "use error::Error; fn f(x: std::sync::Arc<u8>) {}"),
        ] {
            assert_eq!(breaches(name, text), 0, "{name}: {text}");
        }
    }
}
