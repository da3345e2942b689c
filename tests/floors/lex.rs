//! Enough of Rust's grammar to tell code from comments and strings, and to know in which module a
//! token stands.

use std::iter;

use super::Breach;

/// A file of the library.
pub(crate) struct Source {
    name: String,
    tokens: Vec<Token>,
    /// Line by line, what stands in comments.
    comments: Vec<String>,
    /// Line by line, everything.
    lines: Vec<String>,
}

/// A word, `::`, `->`, or a single character.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) text: String,
    /// Counted from 1.
    pub(crate) line: usize,
    /// In an item that `#[cfg(test)]` stands before.
    pub(crate) in_test: bool,
    /// The modules of this file around it.
    pub(crate) inline: Vec<String>,
}

impl Source {
    /// `name` is the path below src/.
    pub(crate) fn new(name: &str, text: &str) -> Self {
        let (code, comments) = split(text);
        let mut tokens = tokens(&code);
        place(&mut tokens);
        let by_line = |text: &str| text.lines().map(String::from).collect();
        Self { name: name.into(), tokens, comments: by_line(&comments), lines: by_line(text) }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn nr_lines(&self) -> usize {
        self.lines.len()
    }

    pub(crate) fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// A file of nothing but tests.
    pub(crate) fn is_test(&self) -> bool {
        self.name.ends_with("tests.rs")
    }

    pub(crate) fn breach(&self, line: usize, what: impl Into<String>) -> Breach {
        Breach { file: self.name.clone(), line, what: what.into() }
    }

    /// `["state", "cell"]` for state/cell.rs, nothing for lib.rs.
    pub(crate) fn module(&self) -> Vec<String> {
        let path = self.name.trim_end_matches(".rs");
        let path = path.trim_end_matches("/mod");
        path.split('/').filter(|&part| part != "lib").map(String::from).collect()
    }

    /// The module below the crate root that this file belongs to.
    pub(crate) fn top_module(&self) -> Option<&str> {
        let top = self.name.split('/').next()?.trim_end_matches(".rs");
        (top != "lib").then_some(top)
    }

    /// Whether the tokens from `at` on read so.
    pub(crate) fn reads(&self, at: usize, words: &[&str]) -> bool {
        reads(&self.tokens, at, words)
    }

    /// The comments on this line and on `above` lines before it, in one. A comment that reaches
    /// into these lines is taken whole.
    pub(crate) fn comments_near(&self, line: usize, above: usize) -> String {
        let mut first = line.saturating_sub(1 + above);
        while first > 0 && self.is_comment(first) && self.is_comment(first - 1) {
            first -= 1;
        }
        let near = self.comments.iter().take(line).skip(first);
        near.map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// Whether the line, counted from 0, is nothing but a comment.
    fn is_comment(&self, line: usize) -> bool {
        self.lines.get(line).is_some_and(|text| text.trim_start().starts_with("//"))
    }

    /// The lines in front of the first item: comments and attributes of the file.
    pub(crate) fn head(&self) -> impl Iterator<Item = &str> {
        self.lines
            .iter()
            .map(|line| line.trim())
            .take_while(|line| line.is_empty() || line.starts_with("//") || line.starts_with("#!"))
    }
}

fn reads(tokens: &[Token], at: usize, words: &[&str]) -> bool {
    let found = tokens.iter().skip(at).map(|token| token.text.as_str());
    found.take(words.len()).eq(words.iter().copied())
}

/// Code without comments and literals, and the comments alone; both keep every line where it was.
fn split(text: &str) -> (String, String) {
    let chars: Vec<char> = text.chars().collect();
    let mut out = (String::new(), String::new());
    let mut at = 0;
    while at < chars.len() {
        let (len, kind) = piece(&chars[at..]);
        for &c in chars.iter().skip(at).take(len) {
            let blank = if c == '\n' { '\n' } else { ' ' };
            let (code, comment) = match kind {
                Kind::Code => (c, blank),
                Kind::Comment => (blank, c),
                Kind::Literal => (blank, blank),
            };
            out.0.push(code);
            out.1.push(comment);
        }
        at += len.max(1);
    }
    out
}

#[derive(Clone, Copy)]
enum Kind {
    Code,
    Comment,
    Literal,
}

/// The length and kind of what starts here. A word is one piece, so that an `r` inside of one does
/// not start a raw string.
fn piece(chars: &[char]) -> (usize, Kind) {
    match chars {
        ['/', '/', ..] => (chars.iter().take_while(|&&c| c != '\n').count(), Kind::Comment),
        ['/', '*', ..] => (block_comment(chars), Kind::Comment),
        ['"', ..] => (string(chars), Kind::Literal),
        ['\'', ..] => match character(chars) {
            Some(len) => (len, Kind::Literal),
            None => (1, Kind::Code),
        },
        [c, ..] if is_word(*c) => {
            let word: String = chars.iter().copied().take_while(|&c| is_word(c)).collect();
            let len = word.chars().count();
            match (word.as_str(), raw_string(&chars[len..])) {
                ("r" | "br" | "cr", Some(more)) => (len + more, Kind::Literal),
                _ => (len, Kind::Code),
            }
        }
        _ => (1, Kind::Code),
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Block comments nest.
fn block_comment(chars: &[char]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < chars.len() {
        match &chars[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn string(chars: &[char]) -> usize {
    let mut at = 1;
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

/// What follows the `r`: hashes, and a string that ends with as many. `None` for `r#word`.
fn raw_string(chars: &[char]) -> Option<usize> {
    let hashes = chars.iter().take_while(|&&c| c == '#').count();
    if chars.get(hashes) != Some(&'"') {
        return None;
    }
    let end: Vec<char> = iter::once('"').chain(iter::repeat_n('#', hashes)).collect();
    let body = &chars[hashes + 1..];
    let close = body.windows(end.len()).position(|window| window == end);
    Some(close.map_or(chars.len(), |close| hashes + 1 + close + end.len()))
}

/// A character literal; `None` for a lifetime.
fn character(chars: &[char]) -> Option<usize> {
    match chars {
        ['\'', '\\', _, rest @ ..] => Some(3 + rest.iter().position(|&c| c == '\'')? + 1),
        ['\'', _, '\'', ..] => Some(3),
        _ => None,
    }
}

fn tokens(code: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while !rest.is_empty() {
            let word: usize = rest.chars().take_while(|&c| is_word(c)).map(char::len_utf8).sum();
            let len = match rest.chars().next() {
                _ if word > 0 => word,
                _ if rest.starts_with("::") || rest.starts_with("->") => 2,
                first => first.map_or(1, char::len_utf8),
            };
            let (text, after) = rest.split_at(len);
            let text = text.into();
            tokens.push(Token { text, line: number + 1, in_test: false, inline: Vec::new() });
            rest = after.trim_start();
        }
    }
    tokens
}

/// Says for each token in which module it stands, and whether it is for tests only.
fn place(tokens: &mut [Token]) {
    let mut blocks: Vec<(Option<String>, bool)> = Vec::new();
    let mut pending = false;
    let mut attribute_end = 0;
    for at in 0..tokens.len() {
        if at >= attribute_end && reads(tokens, at, &["#", "["]) {
            attribute_end = at + 1 + closing(tokens, at + 1);
            pending |= for_tests(&tokens[at..attribute_end]);
        }
        let around = blocks.last().is_some_and(|&(_, test)| test);
        tokens[at].in_test = around || pending;
        tokens[at].inline = blocks.iter().filter_map(|(name, _)| name.clone()).collect();
        if at < attribute_end {
            continue;
        }
        match tokens[at].text.as_str() {
            "{" => {
                let is_module = at >= 2 && tokens[at - 2].text == "mod";
                blocks.push((is_module.then(|| tokens[at - 1].text.clone()), around || pending));
                pending = false;
            }
            "}" => {
                blocks.pop();
                pending = false;
            }
            ";" => pending = false,
            _ => {}
        }
    }
}

/// How many tokens from the opening bracket at `open` to behind its closing one.
pub(crate) fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0_usize;
    for (nr, token) in tokens.iter().skip(open).enumerate() {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return nr + 1;
        }
    }
    tokens.len().saturating_sub(open)
}

/// `#[cfg(test)]` or `#[cfg(all(test, ...))]`, but not `#[cfg(not(test))]`.
fn for_tests(attribute: &[Token]) -> bool {
    let word = |at: usize| attribute.get(at).map(|token| token.text.as_str());
    word(2) == Some("cfg")
        && (4..attribute.len()).any(|at| word(at) == Some("test") && word(at - 2) != Some("not"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        Source::new("addr.rs", text).tokens.into_iter().map(|token| token.text).collect()
    }

    #[test]
    fn comments_and_literals_are_no_code() {
        assert_eq!(words("a // unsafe\nb /* unsafe /* nested */ unsafe */ c"), ["a", "b", "c"]);
        assert_eq!(words(r#"a("unsafe \" unsafe") b"#), ["a", "(", ")", "b"]);
        assert_eq!(words("r#\"un\"safe\"# x br##\"\"#\"## r#fn"), ["x", "r", "#", "fn"]);
        assert_eq!(words(r"'\'' 'x' '\u{1f}' &'a str"), ["&", "'", "a", "str"]);
    }

    #[test]
    fn lines_are_kept() {
        let source = Source::new("addr.rs", "/*\n*/ a\n\"\n\" b // note\nc");
        let lines: Vec<_> = source.tokens.iter().map(|token| token.line).collect();
        assert_eq!(lines, [2, 4, 5]);
        assert!(source.comments_near(5, 1).contains("note"));
        assert!(!source.comments_near(5, 0).contains("note"));
        let source = Source::new("addr.rs", "// one\n// two\n\n// three\n// four\ncode");
        assert_eq!(source.comments_near(6, 1), "// three\n// four\n    ");
    }

    #[test]
    fn test_code_is_told_from_the_rest() {
        let text = "fn a() {} #[cfg(test)] mod tests { mod inner { fn b() {} } } fn c() {}
                    #[cfg(not(test))] fn d() {} #[cfg(all(test, loom))] use e; fn f() {}";
        let source = Source::new("addr.rs", text);
        let find = |name: &str| source.tokens.iter().find(|token| token.text == name);
        let for_tests: Vec<_> = ["a", "b", "c", "d", "e", "f"]
            .into_iter()
            .filter(|name| find(name).is_some_and(|token| token.in_test))
            .collect();
        assert_eq!(for_tests, ["b", "e"]);
        let inline = find("b").map(|token| token.inline.join("::"));
        assert_eq!(inline.as_deref(), Some("tests::inner"));
    }

    #[test]
    fn files_know_their_module() {
        assert_eq!(Source::new("state/cell.rs", "").module(), ["state", "cell"]);
        assert_eq!(Source::new("state/mod.rs", "").module(), ["state"]);
        assert!(Source::new("lib.rs", "").module().is_empty());
        assert_eq!(Source::new("stage2/table/tests.rs", "").top_module(), Some("stage2"));
    }
}
