//! Public signatures speak of addresses, offsets and sizes in their own types.

use super::Breach;
use super::lex::{Source, Token, closing};

/// The doors: constructors, `get()`, and what is made of them.
const DOORS: &[&str] = &["addr.rs", "range.rs", "error.rs", "geometry.rs"];

/// Functions that may say a bare number, and why.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("state/word.rs", "pins", "a count of pins; visible to models only"),
    ("hyp/hypercall.rs", "regs", "registers of the machine: a number until decoded"),
    ("hyp/vcpu.rs", "hvc", "registers of the machine: a number until decoded"),
];

const INTEGERS: &[&str] =
    &["u8", "u16", "u32", "u64", "u128", "usize", "i8", "i16", "i32", "i64", "i128", "isize"];

/// A `pub fn`.
struct Signature<'a> {
    name: &'a str,
    line: usize,
    parameters: Vec<&'a [Token]>,
    output: &'a [Token],
}

/// Bare integers in public signatures outside of the doors, and bool parameters anywhere.
///
/// Bytes (`&[u8]`, `*mut u8`) are data. So is what a function named after a width (`load_u64`) hands over.
/// Counts are numbers and say so: `nr_...` or `..._pages`.
pub(crate) fn bare(source: &Source) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for signature in signatures(source) {
        for parameter in &signature.parameters {
            if parameter.iter().any(|token| token.text == "bool") {
                let what = format!("`{}` takes a bool: an enum says what it means", signature.name);
                breaches.push(source.breach(signature.line, what));
            }
            if !is_count(parameter.first().map_or("", |token| token.text.as_str())) {
                breaches.extend(integer(source, &signature, parameter));
            }
        }
        if !is_count(signature.name) {
            breaches.extend(integer(source, &signature, signature.output));
        }
    }
    breaches
}

/// Exceptions that except nothing.
pub(crate) fn stale(sources: &[Source]) -> Vec<String> {
    let used = |file: &str, name: &str| {
        let source = sources.iter().find(|source| source.name() == file);
        source.is_some_and(|source| signatures(source).iter().any(|it| it.name == name))
    };
    ALLOWED
        .iter()
        .filter(|(file, name, _)| !used(file, name))
        .map(|(file, name, _)| format!("src/{file} has no `pub fn {name}`"))
        .collect()
}

fn is_count(name: &str) -> bool {
    name.starts_with("nr_") || name.ends_with("_pages")
}

fn integer(source: &Source, signature: &Signature<'_>, tokens: &[Token]) -> Option<Breach> {
    let excepted =
        ALLOWED.iter().any(|(file, name, _)| *file == source.name() && *name == signature.name);
    if excepted || DOORS.contains(&source.name()) {
        return None;
    }
    let (_, token) = tokens.iter().enumerate().find(|(at, token)| {
        let before = |nr: usize| at.checked_sub(nr).map_or("", |at| tokens[at].text.as_str());
        let element = token.text == "u8"
            && matches!(
                (before(2), before(1)),
                (_, "[") | ("*", "mut" | "const") | ("NonNull", "<")
            );
        let named_after = signature.name.ends_with(&format!("_{}", token.text));
        INTEGERS.contains(&token.text.as_str()) && !element && !named_after
    })?;
    let what = format!("`{}` speaks of a bare {}", signature.name, token.text);
    Some(source.breach(signature.line, what))
}

fn signatures(source: &Source) -> Vec<Signature<'_>> {
    let tokens = source.tokens();
    let public = |at: &usize| {
        tokens[*at].text == "pub" && !source.reads(at + 1, &["("]) && !tokens[*at].in_test
    };
    (0..tokens.len()).filter(public).filter_map(|at| signature(tokens, at + 1)).collect()
}

/// The function whose qualifiers start at `at`, if it is one.
fn signature(tokens: &[Token], mut at: usize) -> Option<Signature<'_>> {
    while matches!(tokens.get(at)?.text.as_str(), "const" | "async" | "unsafe" | "extern") {
        at += 1;
    }
    if tokens.get(at)?.text != "fn" {
        return None;
    }
    let name = tokens.get(at + 1)?;
    let open = at + 2 + generics(tokens.get(at + 2..)?);
    let close = open + closing(tokens, open);
    let inside = tokens.get(open + 1..close.checked_sub(1)?)?;
    let output = output(tokens.get(close..)?);
    Some(Signature { name: &name.text, line: name.line, parameters: by_comma(inside), output })
}

/// How many tokens `<...>` takes, if it stands here.
fn generics(tokens: &[Token]) -> usize {
    let mut depth = 0_usize;
    for (nr, token) in tokens.iter().enumerate() {
        match token.text.as_str() {
            "<" => depth += 1,
            ">" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return if nr == 0 { 0 } else { nr + 1 };
        }
    }
    0
}

/// From `->` to the body, to `where`, or to the end of a declaration.
fn output(tokens: &[Token]) -> &[Token] {
    if tokens.first().is_none_or(|token| token.text != "->") {
        return &[];
    }
    let mut depth = 0_i32;
    let end = tokens.iter().position(|token| {
        match token.text.as_str() {
            "[" | "(" => depth += 1,
            "]" | ")" => depth -= 1,
            _ => {}
        }
        // `[u8; 4]` has a semicolon of its own.
        depth == 0 && matches!(token.text.as_str(), "{" | "where" | ";")
    });
    &tokens[..end.unwrap_or(tokens.len())]
}

fn by_comma(tokens: &[Token]) -> Vec<&[Token]> {
    let mut depth = 0_i32;
    tokens
        .split(|token| {
            match token.text.as_str() {
                "(" | "[" | "{" | "<" => depth += 1,
                ")" | "]" | "}" | ">" => depth -= 1,
                _ => {}
            }
            depth == 0 && token.text == ","
        })
        .filter(|parameter| !parameter.is_empty())
        .collect()
}

#[cfg(test)]
mod seeded {
    use super::*;

    fn breaches(name: &str, text: &str) -> usize {
        bare(&Source::new(name, text)).len()
    }

    #[test]
    fn bare_integers_are_seen() {
        for text in [
            "pub fn pin(&self, offset: u64) {}",
            "pub const unsafe fn size(&self) -> usize {}",
            "pub fn split<T: Fn(u8) -> Pa>(&self, at: Option<u32>, f: T) -> Result<(), Error> {}",
            "pub fn range(&self) -> Result<(Pa, u64), Error> where Self: Sized {}",
            "pub fn words(&self) -> [u64; 4] {}",
            "pub fn load_u64(&self, at: u32) -> u64 {}",
            "impl X {\n pub fn byte(&self,\n at: u8,\n) {} }",
        ] {
            assert_eq!(breaches("gmem/pin.rs", text), 1, "{text}");
        }
        assert_eq!(breaches("gmem/pin.rs", "pub fn f(at: u64, len: u64) -> u64 {}"), 3);
    }

    #[test]
    fn bool_parameters_are_seen_even_in_doors() {
        assert_eq!(breaches("addr.rs", "pub fn align(self, up: bool) -> Self {}"), 1);
        assert_eq!(breaches("gmem/pin.rs", "pub fn is_pinned(&self) -> bool {}"), 0);
    }

    #[test]
    fn what_is_no_address_is_fine() {
        for text in [
            "pub(crate) fn pin(&self, offset: u64) {}",
            "fn pin(&self, offset: u64) {}",
            "pub fn read(&self, at: Offset, buf: &mut [u8]) -> Result<(), Error> {}",
            "pub fn raw(&self, from: *const u8) -> Option<std::ptr::NonNull<u8>> {}",
            "pub fn digest(&self) -> [u8; 32] { let x: u64 = 0; }",
            "pub fn store_u64(&self, at: Offset, value: u64) -> Result<(), Error> {}",
            "pub fn new(nr_pages: u64) -> Self {}",
            "pub fn changed_pages(&self) -> u64 {}",
            "#[cfg(test)] mod tests { pub fn f(x: u64) {} }",
            "pub struct S { pub x: u64 }",
        ] {
            assert_eq!(breaches("gmem/pin.rs", text), 0, "{text}");
        }
        assert_eq!(breaches("addr.rs", "pub const fn new(raw: u64) -> Self {}"), 0);
    }

    #[test]
    fn an_exception_holds_for_its_function_only() {
        assert_eq!(breaches("state/word.rs", "pub fn pins(self) -> u32 {}"), 0);
        assert_eq!(breaches("state/word.rs", "pub fn maps(self) -> u32 {}"), 1);
        assert_eq!(stale(&[Source::new("state/word.rs", "")]).len(), ALLOWED.len());
    }
}
