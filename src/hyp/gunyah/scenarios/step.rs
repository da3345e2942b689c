//! The steps, as types and as text.

use std::str::FromStr;

use pkvm_oracle::{Name, Pages, Place};

use super::parcel::Message;
use crate::addr::Gfn;
use crate::geometry::PAGE_BYTES;
use crate::hyp::gunyah::host::Side;
use crate::hyp::gunyah::host::process::{Pointer, Span};

/// The host, or a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Who {
    Host,
    Vm(Name),
}

impl FromStr for Who {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "host" { Ok(Self::Host) } else { text.parse().map(Self::Vm) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostAct {
    Load(Pointer),
    Store(Pointer, u8),
    Pin,
    Unpin,
    Discard,
    Punch,
}

/// What becomes of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Pause,
    Resume,
    Stop,
    Reset,
    Close,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// `memory m gmem 4 huge`, `memory m plain 4`
    Memory { name: Name, gmem: bool, nr_pages: u64, huge: bool },
    /// `map-private m`
    MapPrivate(Name),
    /// `vm v`
    Vm(Name),
    /// `bind v 0x1000 m[0..4] share readonly`
    Bind { vm: Name, at: Gfn, pages: Pages, side: Side, writes: bool },
    /// `unbind v 0x1000+4`
    Unbind(Name, Span),
    /// `guest v load 0x1000`, `guest v store 0x1000 0x5a`
    Guest(Name, u64, Option<u8>),
    /// `host load m[0]`
    Host(HostAct, Place),
    /// `provide v 0x1000`: as for another vCPU that has faulted there.
    Provide(Name, Gfn),
    /// `reclaim v 0x1000+4`
    Reclaim(Name, Span),
    /// `turn v 0x1000+4 share`
    Turn(Name, Span, Side),
    /// `stop v`
    Life(Name, Life),
    /// `state v`
    State(Name),
    /// `who m[0]`
    Holder(Place),
    /// `rm v lend p m[0..4] w:rwx`
    Message(Who, Message),
    /// `hear v`: the first notification that waits.
    Hear(Who),
}

/// Words from the left.
pub(super) struct Words<'a>(std::str::SplitAsciiWhitespace<'a>);

impl<'a> Words<'a> {
    pub(super) fn next(&mut self) -> Option<&'a str> {
        self.0.next()
    }

    pub(super) fn word(&mut self, what: &str) -> Result<&'a str, String> {
        self.next().ok_or_else(|| format!("{what} is missing"))
    }

    pub(super) fn read<T: FromStr<Err = String>>(&mut self, what: &str) -> Result<T, String> {
        self.word(what)?.parse()
    }

    pub(super) fn number(&mut self, what: &str) -> Result<u64, String> {
        number(self.word(what)?)
    }

    fn gfn(&mut self) -> Result<Gfn, String> {
        gfn(self.word("an address")?)
    }

    fn span(&mut self) -> Result<Span, String> {
        span(self.word("pages of a VM")?)
    }

    fn byte(&mut self) -> Result<u8, String> {
        let byte = self.number("a byte")?;
        u8::try_from(byte).map_err(|_| format!("{byte:#x} is no byte"))
    }
}

/// Decimal, or hexadecimal after `0x`.
pub(super) fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("`{text}` is no number"))
}

fn gfn(text: &str) -> Result<Gfn, String> {
    let ipa = number(text)?;
    match ipa % PAGE_BYTES as u64 {
        0 => Ok(Gfn::new(ipa / PAGE_BYTES as u64)),
        _ => Err(format!("{ipa:#x} is no page")),
    }
}

/// `0x1000+4`
pub(super) fn span(text: &str) -> Result<Span, String> {
    let (start, nr) = text.split_once('+').ok_or(format!("`{text}` are no pages, as 0x1000+4"))?;
    match number(nr)? {
        0 => Err("no pages".into()),
        nr => Ok(Span { gfn: gfn(start)?, nr }),
    }
}

pub(super) fn side(word: &str) -> Option<Side> {
    match word {
        "lend" => Some(Side::Lent),
        "share" => Some(Side::Shared),
        _ => None,
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = Words(text.split_ascii_whitespace());
        let step = step(&mut words)?;
        match words.next() {
            None => Ok(step),
            Some(word) => Err(format!("`{word}` is too much")),
        }
    }
}

fn step(words: &mut Words<'_>) -> Result<Step, String> {
    let life = |words: &mut Words<'_>, life| Ok(Step::Life(words.read("a VM")?, life));
    match words.word("a step")? {
        "memory" => memory(words),
        "map-private" => Ok(Step::MapPrivate(words.read("a memory")?)),
        "vm" => Ok(Step::Vm(words.read("a name")?)),
        "bind" => bind(words),
        "unbind" => Ok(Step::Unbind(words.read("a VM")?, words.span()?)),
        "guest" => {
            let vm = words.read("a VM")?;
            let act = words.word("load or store")?;
            let at = words.number("an address")?;
            match act {
                "load" => Ok(Step::Guest(vm, at, None)),
                "store" => Ok(Step::Guest(vm, at, Some(words.byte()?))),
                other => Err(format!("no guest can `{other}`")),
            }
        }
        "host" => host(words),
        "provide" => Ok(Step::Provide(words.read("a VM")?, words.gfn()?)),
        "reclaim" => Ok(Step::Reclaim(words.read("a VM")?, words.span()?)),
        "turn" => {
            let (vm, span) = (words.read("a VM")?, words.span()?);
            let to = words.word("lend or share")?;
            Ok(Step::Turn(vm, span, side(to).ok_or(format!("nothing turns {to}"))?))
        }
        "pause" => life(words, Life::Pause),
        "resume" => life(words, Life::Resume),
        "stop" => life(words, Life::Stop),
        "reset" => life(words, Life::Reset),
        "close" => life(words, Life::Close),
        "state" => Ok(Step::State(words.read("a VM")?)),
        "who" => Ok(Step::Holder(words.read("a place")?)),
        "rm" => {
            let who = words.read("who")?;
            Ok(Step::Message(who, Message::read(words)?))
        }
        "hear" => Ok(Step::Hear(words.read("who")?)),
        other => Err(format!("`{other}` is no step")),
    }
}

fn memory(words: &mut Words<'_>) -> Result<Step, String> {
    let name = words.read("a name")?;
    let gmem = match words.word("gmem or plain")? {
        "gmem" => true,
        "plain" => false,
        other => return Err(format!("`{other}` is no memory")),
    };
    let nr_pages = words.number("a number of pages")?;
    let huge = match words.next() {
        None => false,
        Some("huge") => true,
        Some(other) => return Err(format!("`{other}` is no size of pages")),
    };
    Ok(Step::Memory { name, gmem, nr_pages, huge })
}

fn bind(words: &mut Words<'_>) -> Result<Step, String> {
    let (vm, at, pages) = (words.read("a VM")?, words.gfn()?, words.read("pages")?);
    let (mut side, mut writes) = (Side::Lent, true);
    while let Some(word) = words.next() {
        match word {
            "share" => side = Side::Shared,
            "readonly" => writes = false,
            other => return Err(format!("`{other}` is no flag of a binding")),
        }
    }
    Ok(Step::Bind { vm, at, pages, side, writes })
}

fn host(words: &mut Words<'_>) -> Result<Step, String> {
    use Pointer::{Alias, Kernel, Uaccess, User};
    let word = words.word("what the host does")?;
    let place = words.read("a place")?;
    let act = match word {
        "load" => HostAct::Load(User),
        "store" => HostAct::Store(User, words.byte()?),
        // As system calls are named: what the kernel reads goes into memory.
        "write" => HostAct::Load(Uaccess),
        "read" => HostAct::Store(Uaccess, words.byte()?),
        "vm-read" => HostAct::Load(Alias),
        "vm-write" => HostAct::Store(Alias, words.byte()?),
        "kernel-load" => HostAct::Load(Kernel),
        "kernel-store" => HostAct::Store(Kernel, words.byte()?),
        "pin" => HostAct::Pin,
        "unpin" => HostAct::Unpin,
        "discard" => HostAct::Discard,
        "punch" => HostAct::Punch,
        other => return Err(format!("no host can `{other}`")),
    };
    Ok(Step::Host(act, place))
}
