//! The words of a line.

use crate::name::{Ipa, Name, Pages, Place, VcpuName};

/// Takes words from the left, and says what it wanted where there is none.
pub(crate) struct Words<'a> {
    rest: std::str::SplitAsciiWhitespace<'a>,
}

impl<'a> Words<'a> {
    pub(crate) fn of(text: &'a str) -> Self {
        Self { rest: text.split_ascii_whitespace() }
    }

    pub(crate) fn next(&mut self) -> Option<&'a str> {
        self.rest.next()
    }

    pub(crate) fn word(&mut self, what: &str) -> Result<&'a str, String> {
        self.next().ok_or_else(|| format!("{what} is missing"))
    }

    pub(crate) fn number(&mut self, what: &str) -> Result<u64, String> {
        number(self.word(what)?)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, String> {
        let value = self.number("a byte")?;
        u8::try_from(value).map_err(|_| format!("{value:#x} is no byte"))
    }

    pub(crate) fn ipa(&mut self) -> Result<Ipa, String> {
        self.number("a guest address").map(Ipa)
    }

    pub(crate) fn name(&mut self, what: &str) -> Result<Name, String> {
        self.word(what)?.parse()
    }

    pub(crate) fn vcpu(&mut self) -> Result<VcpuName, String> {
        self.word("a vCPU")?.parse()
    }

    pub(crate) fn place(&mut self) -> Result<Place, String> {
        self.word("a place")?.parse()
    }

    pub(crate) fn pages(&mut self) -> Result<Pages, String> {
        self.word("pages")?.parse()
    }

    pub(crate) fn end(&mut self) -> Result<(), String> {
        match self.next() {
            None => Ok(()),
            Some(word) => Err(format!("`{word}` is too much")),
        }
    }
}

/// Decimal, or hexadecimal after `0x`; `_` between digits.
pub(crate) fn number(text: &str) -> Result<u64, String> {
    let digits = text.replace('_', "");
    let parsed = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no number"))
}
