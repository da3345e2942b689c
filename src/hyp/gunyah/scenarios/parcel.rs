//! Messages to the resource manager, by words.

use pkvm_oracle::{Name, Pages};

use super::step::{Who, Words, number, span};
use crate::hyp::gunyah::host::process::Span;
use crate::hyp::gunyah::rm::message::Transfer;
use crate::hyp::gunyah::rm::{accept, create, notify, release};

/// Pages of the host's memory, of a VM's addresses, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Pages(Pages),
    Span(Span),
    Nothing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// `lend p m[0..4] w:rwx host:rw sanitize append io label 7`
    Create {
        parcel: Name,
        transfer: Transfer,
        what: What,
        members: Vec<(Who, u8)>,
        flags: u8,
        mem_type: u8,
        label: u32,
    },
    /// `append p m[4..8] done`
    Append { parcel: Name, what: What, flags: u8 },
    /// `accept p lend at 0x1000+4 sanitize early contiguous other v check-sanitized check-label 7 check w:rwx`
    Accept {
        parcel: Name,
        transfer: Transfer,
        places: Vec<Span>,
        members: Vec<(Who, u8)>,
        map_for: Option<Who>,
        flags: u8,
        mem_type: u8,
        label: u32,
    },
    /// `release p sanitize`
    Release { parcel: Name, flags: u8 },
    /// `reclaim p sanitize`
    Reclaim { parcel: Name, flags: u8 },
    /// `notify p shared v w`
    Notify { parcel: Name, flags: u8, to: Vec<Who> },
    /// `raw 0x51000014 0700`: a number and bytes.
    Raw(u32, Vec<u8>),
}

fn transfer(word: &str) -> Result<Transfer, String> {
    match word {
        "donate" => Ok(Transfer::Donate),
        "lend" => Ok(Transfer::Lend),
        "share" => Ok(Transfer::Share),
        other => Err(format!("`{other}` is no way to pass memory on")),
    }
}

/// `w:rwx`
fn member(word: &str) -> Result<(Who, u8), String> {
    let (who, letters) = word.split_once(':').ok_or(format!("`{word}` is nothing here"))?;
    let mut rights = 0;
    for letter in letters.chars() {
        rights |= match letter {
            'x' => 1,
            'w' => 2,
            'r' => 4,
            other => return Err(format!("`{other}` is no right")),
        };
    }
    Ok((who.parse()?, rights))
}

fn what(word: &str) -> Result<What, String> {
    match word {
        "none" => Ok(What::Nothing),
        _ if word.contains('[') => word.parse().map(What::Pages),
        _ => span(word).map(What::Span),
    }
}

fn narrow(value: u64) -> Result<u32, String> {
    u32::try_from(value).map_err(|_| format!("{value:#x} is too large"))
}

/// The one word that may follow.
fn flag(words: &mut Words<'_>, word: &str, flag: u8) -> Result<u8, String> {
    match words.next() {
        None => Ok(0),
        Some(found) if found == word => Ok(flag),
        Some(other) => Err(format!("`{other}` is not `{word}`")),
    }
}

impl Message {
    pub(super) fn read(words: &mut Words<'_>) -> Result<Self, String> {
        let verb = words.word("a message")?;
        if verb == "raw" {
            let id = narrow(words.number("a number")?)?;
            return Ok(Self::Raw(id, words.next().map_or(Ok(Vec::new()), bytes)?));
        }
        let parcel = words.read("a parcel")?;
        match verb {
            "accept" => read_accept(parcel, words),
            "append" => {
                let what = what(words.word("pages")?)?;
                Ok(Self::Append { parcel, what, flags: flag(words, "done", create::APPEND_DONE)? })
            }
            "release" => {
                Ok(Self::Release { parcel, flags: flag(words, "sanitize", release::SANITIZE)? })
            }
            "reclaim" => {
                Ok(Self::Reclaim { parcel, flags: flag(words, "sanitize", release::SANITIZE)? })
            }
            "notify" => {
                let flags = match words.word("of what")? {
                    "shared" => notify::OF_SHARED,
                    "released" => notify::OF_RELEASED,
                    "accepted" => notify::OF_ACCEPTED,
                    "recall" => notify::OF_RECALL,
                    other => return Err(format!("nobody is told of `{other}`")),
                };
                let mut to = Vec::new();
                while let Some(who) = words.next() {
                    to.push(who.parse()?);
                }
                Ok(Self::Notify { parcel, flags, to })
            }
            verb => read_create(parcel, transfer(verb)?, words),
        }
    }
}

fn read_create(parcel: Name, transfer: Transfer, words: &mut Words<'_>) -> Result<Message, String> {
    let what = what(words.word("pages")?)?;
    let (mut members, mut flags, mut mem_type, mut label) = (Vec::new(), 0, 0, 0);
    while let Some(word) = words.next() {
        match word {
            "sanitize" => flags |= create::SANITIZE,
            "append" => flags |= create::WILL_APPEND,
            "io" => mem_type = 1,
            "label" => label = narrow(words.number("a label")?)?,
            word => members.push(member(word)?),
        }
    }
    Ok(Message::Create { parcel, transfer, what, members, flags, mem_type, label })
}

fn read_accept(parcel: Name, words: &mut Words<'_>) -> Result<Message, String> {
    let transfer = transfer(words.word("lend, share or donate")?)?;
    let (mut places, mut members, mut map_for) = (Vec::new(), Vec::new(), None);
    let (mut flags, mut mem_type, mut label) = (accept::DONE, 0, 0);
    while let Some(word) = words.next() {
        match word {
            "at" => places.push(span(words.word("pages")?)?),
            "sanitize" => flags |= accept::SANITIZE,
            "early" => flags &= !accept::DONE,
            "contiguous" => flags |= accept::MAP_CONTIGUOUS,
            "other" => {
                flags |= accept::MAP_OTHER;
                map_for = Some(words.read("a VM")?);
            }
            "io" => mem_type = 1,
            "check" => flags |= accept::VALIDATE_ACL_ATTR,
            "check-sanitized" => flags |= accept::VALIDATE_SANITIZED,
            "check-label" => {
                flags |= accept::VALIDATE_LABEL;
                label = narrow(words.number("a label")?)?;
            }
            word => members.push(member(word)?),
        }
    }
    Ok(Message::Accept { parcel, transfer, places, members, map_for, flags, mem_type, label })
}

fn bytes(text: &str) -> Result<Vec<u8>, String> {
    if text.len() % 2 != 0 || !text.is_ascii() {
        return Err(format!("`{text}` are no bytes"));
    }
    let byte = |at| number(&format!("0x{}", &text[at..at + 2]));
    (0..text.len())
        .step_by(2)
        .map(|at| byte(at).and_then(|byte| u8::try_from(byte).map_err(|why| why.to_string())))
        .collect()
}
