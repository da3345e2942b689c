//! What a step shows, as a type and as text.

use std::fmt;
use std::str::FromStr;

use crate::errno::Errno;
use crate::name::Ipa;
use crate::words::{Words, number};

/// A signal that an access of the host's raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// SIGSEGV.
    Segv,
    /// SIGBUS.
    Bus,
}

/// What one step showed. Its text is what is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Observation {
    /// `ok`: it went well, and there is nothing more to say.
    Ok,
    /// `EPERM`: the system call failed.
    Failed(Errno),
    /// `short`: the system call did less than it was asked for, without an error.
    Short,
    /// `0x5a`: the byte that was seen.
    Byte(u8),
    /// `3 pages`.
    Pages(u64),
    /// `SIGSEGV 2`: the access raised a signal with this si_code.
    Signal(Signal, i32),
    /// `x0=-3`: what MEM_SHARE or MEM_UNSHARE returned to the guest.
    Answer(i64),
    /// `x0=0 x1=0 x2=0 x3=0`: what a hypercall left in the guest's registers.
    Registers([i64; 4]),
    /// `run EFAULT`: KVM_RUN failed, and the vCPU is still at that instruction.
    Run(Errno),
    /// `mmio load 0x70000000`: the guest's load went to the VMM, which answered with 0.
    MmioLoad(Ipa),
    /// `mmio store 0x70000000 0x5a`: the guest's store went to the VMM.
    MmioStore(Ipa, u8),
    /// `exception 0x2000000`: the guest took an exception with this ESR_EL1.
    Exception(u64),
    /// `exit 24`: KVM_RUN ended for this other reason.
    Exit(u32),
    /// `spins`: KVM_RUN did not return until a signal made it.
    Spins,
    /// `stuck`: the vCPU is still at an instruction that did not end, and was not run.
    Stuck,
    /// `idle`: there was nothing to resume.
    Idle,
    /// `nothing`: the scenario names something that is not there (any more).
    Nothing,
}

const WORDS: &[(&str, Observation)] = &[
    ("ok", Observation::Ok),
    ("short", Observation::Short),
    ("spins", Observation::Spins),
    ("stuck", Observation::Stuck),
    ("idle", Observation::Idle),
    ("nothing", Observation::Nothing),
];

impl fmt::Display for Observation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(errno) => write!(f, "{errno}"),
            Self::Byte(byte) => write!(f, "{byte:#x}"),
            Self::Pages(pages) => write!(f, "{pages} pages"),
            Self::Signal(Signal::Segv, code) => write!(f, "SIGSEGV {code}"),
            Self::Signal(Signal::Bus, code) => write!(f, "SIGBUS {code}"),
            Self::Answer(x0) => write!(f, "x0={x0}"),
            Self::Registers([x0, x1, x2, x3]) => write!(f, "x0={x0} x1={x1} x2={x2} x3={x3}"),
            Self::Run(errno) => write!(f, "run {errno}"),
            Self::MmioLoad(ipa) => write!(f, "mmio load {ipa}"),
            Self::MmioStore(ipa, byte) => write!(f, "mmio store {ipa} {byte:#x}"),
            Self::Exception(esr) => write!(f, "exception {esr:#x}"),
            Self::Exit(reason) => write!(f, "exit {reason}"),
            Self::Ok | Self::Short | Self::Spins | Self::Stuck | Self::Idle | Self::Nothing => {
                let word = WORDS.iter().find(|(_, seen)| seen == self).map(|(word, _)| *word);
                f.write_str(word.ok_or(fmt::Error)?)
            }
        }
    }
}

impl FromStr for Observation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = Words::of(text);
        let first = words.word("an observation")?;
        let seen = match first {
            "run" => Self::Run(words.word("an errno")?.parse()?),
            "mmio" => match words.word("`load` or `store`")? {
                "load" => Self::MmioLoad(words.ipa()?),
                "store" => Self::MmioStore(words.ipa()?, words.byte()?),
                other => return Err(format!("there is no mmio {other}")),
            },
            "exception" => Self::Exception(words.number("a syndrome")?),
            "exit" => Self::Exit(narrow(words.number("a reason")?)?),
            "SIGSEGV" => Self::Signal(Signal::Segv, narrow(words.number("an si_code")?)?),
            "SIGBUS" => Self::Signal(Signal::Bus, narrow(words.number("an si_code")?)?),
            _ if first.starts_with("x0=") => registers(first, &mut words)?,
            _ if first.starts_with("0x") => Self::Byte(narrow(number(first)?)?),
            _ if first.starts_with(|c: char| c.is_ascii_digit()) => match words.next() {
                Some("pages") => Self::Pages(number(first)?),
                _ => return Err(format!("`{text}` is neither a byte (0x..) nor pages")),
            },
            _ => match WORDS.iter().find(|(word, _)| *word == first) {
                Some((_, seen)) => *seen,
                None => Self::Failed(first.parse()?),
            },
        };
        words.end()?;
        Ok(seen)
    }
}

fn narrow<T: TryFrom<u64>>(value: u64) -> Result<T, String> {
    T::try_from(value).map_err(|_| format!("{value:#x} is too large"))
}

fn registers(first: &str, words: &mut Words<'_>) -> Result<Observation, String> {
    let value = |word: &str, name: &str| {
        word.strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('='))
            .and_then(|value| value.parse::<i64>().ok())
            .ok_or_else(|| format!("`{word}` is not what {name} held"))
    };
    let x0 = value(first, "x0")?;
    let Some(x1) = words.next() else { return Ok(Observation::Answer(x0)) };
    let x1 = value(x1, "x1")?;
    let x2 = value(words.word("x2")?, "x2")?;
    let x3 = value(words.word("x3")?, "x3")?;
    Ok(Observation::Registers([x0, x1, x2, x3]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observation_prints_as_it_reads() {
        for text in [
            "ok",
            "short",
            "spins",
            "stuck",
            "idle",
            "nothing",
            "EPERM",
            "E199",
            "0x5a",
            "0x0",
            "0 pages",
            "12 pages",
            "SIGSEGV 2",
            "SIGBUS 3",
            "x0=-3",
            "x0=4096 x1=0 x2=-1 x3=0",
            "run EFAULT",
            "mmio load 0x70000000",
            "mmio store 0x70000000 0x5a",
            "exception 0x2000000",
            "exit 24",
        ] {
            let seen: Observation = text.parse().unwrap_or_else(|why| panic!("{text}: {why}"));
            assert_eq!(seen.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_observation_is_refused() {
        for text in [
            "",
            "OK",
            "okay",
            "ok ok",
            "0x100",
            "12",
            "pages",
            "run",
            "run x",
            "mmio",
            "mmio jump",
            "SIGFPE 1",
            "SIGSEGV",
            "x0=",
            "x0=0 x1=0",
            "x1=0",
            "exit",
            "EFOO",
            "?",
        ] {
            assert!(text.parse::<Observation>().is_err(), "`{text}` was read");
        }
    }
}
