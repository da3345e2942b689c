//! Where `unsafe` and memory orderings may be written, and what must stand beside them.

use super::Breach;
use super::lex::Source;

/// Files that may hold `unsafe`: those that reach memory or the kernel.
const UNSAFE: &[&str] =
    &["os/", "backing/copies.rs", "backing/heap.rs", "sync/spin.rs", "vm_memory.rs"];

/// Files that own an atomic.
const ORDERINGS: &[&str] = &[
    "hyp/el2/host_struct.rs",
    "identity.rs",
    "os/",
    "sync/modelled.rs",
    "sync/spin.rs",
    "state/barrier.rs",
    "state/cell.rs",
    "state/epoch.rs",
    "state/holders.rs",
    "state/waiting.rs",
    "folio/holes.rs",
    "folio/map.rs",
    "hyp/el2/tlb.rs",
];

/// Files that hand on the orderings of others: the facade, and a trait of vm-memory. They may name
/// the type, but choose none.
const HANDED_ON: &[&str] = &["sync.rs", "vm_memory.rs"];

/// How far above an ordering its comment may stand.
const COMMENT_ABOVE: usize = 6;

fn listed(list: &[&str], source: &Source) -> bool {
    list.iter().any(|&entry| match entry.ends_with('/') {
        true => source.name().starts_with(entry),
        false => source.name() == entry,
    })
}

/// `unsafe` in a fenced file only, which says so at its head; and no fence around nothing.
pub(crate) fn unsafe_code(source: &Source) -> Vec<Breach> {
    let uses: Vec<_> = source.tokens().iter().filter(|token| token.text == "unsafe").collect();
    let fence = source.head().any(|line| line.starts_with("#![expect(unsafe_code"));
    let reason = source.head().any(|line| line.starts_with("// UNSAFETY: "));
    let mut breaches = Vec::new();

    if !listed(UNSAFE, source) {
        let what = format!("`unsafe` is for {} only", UNSAFE.join(", "));
        breaches.extend(uses.iter().map(|token| source.breach(token.line, what.clone())));
    }
    match uses.first() {
        Some(first) if !fence => {
            let what = "the file lacks `#![expect(unsafe_code, ...)]` at its head";
            breaches.push(source.breach(first.line, what));
        }
        Some(first) if !reason => {
            let what = "the file lacks `// UNSAFETY: why` at its head";
            breaches.push(source.breach(first.line, what));
        }
        None if fence => breaches.push(source.breach(1, "a fence around no unsafe code")),
        _ => {}
    }
    // A reader must see it first, so it is lifted for a whole file or not at all.
    let lifted = source.tokens().iter().filter(|token| token.text == "unsafe_code");
    breaches.extend(lifted.skip(usize::from(fence)).map(|token| {
        source.breach(token.line, "`unsafe_code` is lifted at the head of a file or nowhere")
    }));
    breaches
}

const ATOMIC: [&str; 5] = ["Relaxed", "Acquire", "Release", "AcqRel", "SeqCst"];

/// An ordering only where an atomic lives, and with a comment that names its partner.
pub(crate) fn orderings(source: &Source) -> Vec<Breach> {
    let tokens = source.tokens();
    let mut breaches = Vec::new();
    let mut judged = 0;
    for (at, token) in tokens.iter().enumerate().filter(|(_, token)| token.text == "Ordering") {
        if is_of_cmp(source, at) {
            continue;
        }
        let named = match source.reads(at + 1, &["::"]) {
            true => tokens.get(at + 2).map_or("", |token| token.text.as_str()),
            false => "",
        };
        let handed_on = named.is_empty() && listed(HANDED_ON, source);
        if !handed_on && !listed(ORDERINGS, source) {
            let what = format!("memory orderings are for {} only", ORDERINGS.join(", "));
            breaches.push(source.breach(token.line, what));
            continue;
        }
        if matches!(named, "{" | "*") || is_imported_variant(source, at) {
            let what = "import `Ordering`, not its variants: uses must show which they are";
            breaches.push(source.breach(token.line, what));
            continue;
        }
        let exempt = token.in_test || source.is_test() || judged == token.line;
        if ATOMIC.contains(&named) && !exempt {
            judged = token.line;
            let near = source.comments_near(token.line, COMMENT_ABOVE);
            if !near.contains("pairs with") && !near.contains("Relaxed:") {
                let what = format!("{named} without a comment `pairs with ...` or `Relaxed: ...`");
                breaches.push(source.breach(token.line, what));
            }
        }
    }
    breaches
}

/// `use ...::Ordering::Acquire;`
fn is_imported_variant(source: &Source, at: usize) -> bool {
    let before = source.tokens()[..at].iter().rev();
    let start = before.take_while(|token| !matches!(token.text.as_str(), ";" | "}")).last();
    start.is_some_and(|token| token.text == "use") && source.reads(at + 1, &["::"])
}

/// Whether this `Ordering` is that of comparisons.
fn is_of_cmp(source: &Source, at: usize) -> bool {
    let tokens = source.tokens();
    if source.reads(at + 1, &["::"]) {
        let named = tokens.get(at + 2).map_or("", |token| token.text.as_str());
        return ["Less", "Equal", "Greater"].contains(&named);
    }
    if at >= 2 && source.reads(at - 2, &["cmp", "::"]) {
        return true;
    }
    // In an import, what counts is the path; elsewhere, what the file imports under this name.
    let atomic = at >= 1 && matches!(tokens[at - 1].text.as_str(), "::" | "{" | ",");
    !atomic && (0..tokens.len()).any(|at| source.reads(at, &["cmp", "::", "Ordering"]))
}

#[cfg(test)]
mod seeded {
    use super::*;

    const HEAD: &str =
        "//! Doc.\n\n// UNSAFETY: it must.\n#![expect(unsafe_code, reason = \"\")]\n";

    fn unsafes(name: &str, text: &str) -> usize {
        unsafe_code(&Source::new(name, text)).len()
    }

    fn orders(name: &str, text: &str) -> usize {
        orderings(&Source::new(name, text)).len()
    }

    #[test]
    fn unsafe_outside_of_the_fence_is_seen() {
        let body = "fn f() { unsafe { g() } }";
        assert_eq!(unsafes("gmem/pin.rs", &format!("{HEAD}{body}")), 1);
        assert_eq!(unsafes("gmem/pin.rs", "unsafe impl Send for X {}"), 2, "no fence either");
        assert_eq!(unsafes("os/uffd.rs", &format!("{HEAD}{body}")), 0);
    }

    #[test]
    fn a_fence_must_be_announced_and_needed() {
        assert_eq!(unsafes("os/uffd.rs", "fn f() { unsafe { g() } }"), 1);
        let mute = "#![expect(unsafe_code, reason = \"\")]\nfn f() { unsafe { g() } }";
        assert_eq!(unsafes("os/uffd.rs", mute), 1);
        assert_eq!(unsafes("os/uffd.rs", &format!("{HEAD}fn f() {{}}")), 1);
        let local = "#[expect(unsafe_code, reason = \"\")]\nfn f() {}";
        assert_eq!(unsafes("gmem/pin.rs", local), 1);
    }

    #[test]
    fn talk_of_unsafe_is_no_unsafe() {
        let text = "// unsafe\nconst S: &str = \"unsafe\"; /* unsafe { } */ fn not_unsafe() {}";
        assert_eq!(unsafes("gmem/pin.rs", text), 0);
    }

    #[test]
    fn an_ordering_outside_of_its_files_is_seen() {
        for text in [
            "use std::sync::atomic::Ordering;",
            "use std::sync::atomic::{AtomicU64, Ordering};",
            "fn f() { x.load(std::sync::atomic::Ordering::Relaxed /* Relaxed: no partner */); }",
            "fn f(a: std::cmp::Ordering) {} use std::sync::atomic::Ordering;",
        ] {
            assert_eq!(orders("gmem/pin.rs", text), 1, "{text}");
        }
        assert_eq!(orders("state/cell.rs", "use std::sync::atomic::Ordering;"), 0);
        assert_eq!(orders("vm_memory.rs", "fn load(&self, order: Ordering) {}"), 0);
        assert_eq!(
            orders("vm_memory.rs", "fn f() { x.load(Ordering::SeqCst /* pairs with */) }"),
            1
        );
    }

    #[test]
    fn an_ordering_without_its_partner_is_seen() {
        let far = format!("// pairs with `g`.\n{}x.load(Ordering::Acquire);", "\n".repeat(6));
        assert_eq!(orders("state/cell.rs", &far), 1);
        assert_eq!(orders("state/cell.rs", "x.load(Ordering::Acquire); // Acquire"), 1);
        let near = far.replacen('\n', "", 1);
        assert_eq!(orders("state/cell.rs", &near), 0);
        assert_eq!(orders("state/cell.rs", "x.load(Ordering::Relaxed); // Relaxed: a hint"), 0);
        let test = "#[cfg(test)] mod tests { fn f() { x.load(Ordering::SeqCst); } }";
        assert_eq!(orders("state/cell.rs", test), 0);
    }

    #[test]
    fn variants_may_not_be_imported() {
        for text in [
            "use std::sync::atomic::Ordering::{Acquire, Release};",
            "use std::sync::atomic::Ordering::*;",
            "fn f() {} use std::sync::atomic::Ordering::Acquire; // pairs with nothing",
        ] {
            assert_eq!(orders("state/cell.rs", text), 1, "{text}");
        }
    }

    #[test]
    fn comparisons_are_something_else() {
        let text = "use std::cmp::Ordering; fn f() -> Ordering { Ordering::Less }";
        assert_eq!(orders("gmem/pin.rs", text), 0);
        assert_eq!(orders("gmem/pin.rs", "fn f() -> std::cmp::Ordering { a.cmp(b) }"), 0);
    }
}
