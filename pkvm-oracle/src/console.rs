//! How an agent tells what it saw, over a console that others write to as well.
//!
//! Lines that begin with `@` are the agent's. All else is somebody's noise.

use std::fmt;

use crate::observation::Observation;

/// How the process that ran a scenario ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// After its last step.
    Well,
    /// By itself, but with this status: it could not go on.
    Status(i32),
    /// By this signal.
    Killed(i32),
    /// Not in time; it was killed.
    Hung,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Well => f.write_str("well"),
            Self::Status(status) => write!(f, "status {status}"),
            Self::Killed(signal) => write!(f, "killed {signal}"),
            Self::Hung => f.write_str("hung"),
        }
    }
}

/// The line before a scenario's first.
#[must_use]
pub fn begin(name: &str) -> String {
    format!("@begin {name}")
}

/// The line for a step.
#[must_use]
pub fn observed(number: usize, observation: &Observation) -> String {
    format!("@at {number} {observation}")
}

/// The line after a scenario's last.
#[must_use]
pub fn ended(name: &str, ending: Ending) -> String {
    format!("@end {name} {ending}")
}

/// The last line of all.
pub const DONE: &str = "@done";

/// How a note begins that says that the kernel was damaged or warned of itself. It is a disagreement.
pub const TAINTED: &str = "the kernel is tainted:";

/// The line for what is worth knowing, but not compared.
#[must_use]
pub fn note(text: &str) -> String {
    format!("@note {text}")
}

/// The line of an agent that cannot begin.
#[must_use]
pub fn lacking(why: &str) -> String {
    format!("@lacking {why}")
}

/// What was told of one scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Its name.
    pub name: String,
    /// Numbers of lines, and what was seen there.
    pub seen: Vec<(usize, Observation)>,
    /// How it ended, if that was told.
    pub ending: Option<Ending>,
    /// What was noted while it ran.
    pub notes: Vec<String>,
}

/// All that an agent told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// Scenarios, in the order in which they ran.
    pub told: Vec<Told>,
    /// Notes from before the first scenario.
    pub notes: Vec<String>,
    /// Why nothing could be run.
    pub lacking: Option<String>,
    /// The agent came to its end.
    pub complete: bool,
}

impl Transcript {
    /// Reads a console.
    ///
    /// # Errors
    /// A line of the agent's that it cannot have written: the console lost something.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut transcript = Self::default();
        for line in text.lines().map(str::trim_end).filter(|line| line.starts_with('@')) {
            transcript.take(line).map_err(|why| format!("the console has `{line}`: {why}"))?;
        }
        Ok(transcript)
    }

    fn take(&mut self, line: &str) -> Result<(), String> {
        if self.complete {
            return Err("a line after the last".into());
        }
        if line == DONE {
            self.complete = true;
            return Ok(());
        }
        let (word, rest) = line.split_once(' ').ok_or("half a line")?;
        let open = self.told.last_mut().filter(|told| told.ending.is_none());
        match (word, open) {
            ("@begin", None) => self.told.push(Told {
                name: rest.into(),
                seen: Vec::new(),
                ending: None,
                notes: Vec::new(),
            }),
            ("@at", Some(told)) => {
                let (number, seen) = rest.split_once(' ').ok_or("half a line")?;
                let number = number.parse().map_err(|_| "no number of a line")?;
                told.seen.push((number, seen.parse()?));
            }
            ("@end", Some(told)) => {
                let (name, ending) = rest.split_once(' ').ok_or("half a line")?;
                if name != told.name {
                    return Err(format!("{} is running", told.name));
                }
                told.ending = Some(read_ending(ending)?);
            }
            ("@note", Some(told)) => told.notes.push(rest.into()),
            ("@note", None) => match self.told.last_mut() {
                Some(told) => told.notes.push(rest.into()),
                None => self.notes.push(rest.into()),
            },
            ("@lacking", None) => self.lacking = Some(rest.into()),
            _ => return Err("out of order".into()),
        }
        Ok(())
    }
}

fn read_ending(text: &str) -> Result<Ending, String> {
    let number = |text: &str| text.parse().map_err(|_| format!("`{text}` is no number"));
    match text.split_once(' ') {
        None if text == "well" => Ok(Ending::Well),
        None if text == "hung" => Ok(Ending::Hung),
        Some(("status", status)) => number(status).map(Ending::Status),
        Some(("killed", signal)) => number(signal).map(Ending::Killed),
        _ => Err(format!("`{text}` is no ending")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_read_among_noise() {
        let endings = [Ending::Well, Ending::Status(3), Ending::Killed(11), Ending::Hung];
        let mut console = format!("booting\r\n{}\r\n", note("kernel 7.2"));
        for (at, ending) in endings.into_iter().enumerate() {
            let name = format!("scenario{at}");
            console += &format!("{}\r\n[ 1.0] noise\r\n", begin(&name));
            console += &format!("{}\r\n", observed(at + 7, &Observation::Byte(0x5a)));
            console += &format!("{}\r\n", ended(&name, ending));
        }
        console += DONE;
        let transcript = Transcript::parse(&console).unwrap();
        assert!(transcript.complete && transcript.notes == ["kernel 7.2"]);
        assert_eq!(transcript.told.len(), endings.len());
        for (at, told) in transcript.told.iter().enumerate() {
            assert_eq!(told.name, format!("scenario{at}"));
            assert_eq!(told.seen, [(at + 7, Observation::Byte(0x5a))]);
            assert_eq!(told.ending, Some(endings[at]));
        }
    }

    #[test]
    fn a_console_that_lost_something_is_refused() {
        for bad in [
            "@at 3 ok",
            "@begin a\n@begin b",
            "@begin a\n@at ok",
            "@begin a\n@at 3",
            "@begin a\n@at 3 okay",
            "@begin a\n@end b well",
            "@begin a\n@end a",
            "@begin a\n@end a badly",
            "@done\n@note late",
            "@",
            "@beg",
        ] {
            assert!(Transcript::parse(bad).is_err(), "{bad:?} was read");
        }
    }

    #[test]
    fn an_agent_that_stops_is_not_complete() {
        let transcript = Transcript::parse("@begin a\n@at 3 ok\n").unwrap();
        assert!(!transcript.complete);
        assert_eq!(transcript.told[0].ending, None);
        let transcript = Transcript::parse("@lacking no pKVM\n@done").unwrap();
        assert_eq!(transcript.lacking.as_deref(), Some("no pKVM"));
    }
}
