//! Just enough JSON to read one flat object: the example's last line.

use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Bool(bool),
    Number(f64),
    Text(String),
    Null,
}

/// Reads `{"key": value, ...}` where every value is a bool, a number, a string or null.
pub(crate) fn parse_object(line: &str) -> Result<BTreeMap<String, Value>, String> {
    let mut rest = line.trim();
    rest = take(rest, '{')?;
    let mut object = BTreeMap::new();
    if let Some(end) = rest.trim_start().strip_prefix('}') {
        return at_end(end, object);
    }
    loop {
        let (key, after) = text(rest.trim_start())?;
        let (value, after) = value(take(after, ':')?.trim_start())?;
        if object.insert(key.clone(), value).is_some() {
            return Err(format!("the key {key:?} comes twice"));
        }
        rest = after.trim_start();
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => return at_end(take(rest, '}')?, object),
        }
    }
}

fn at_end<T>(rest: &str, parsed: T) -> Result<T, String> {
    if rest.trim().is_empty() { Ok(parsed) } else { Err(format!("trailing {rest:?}")) }
}

fn take(rest: &str, wanted: char) -> Result<&str, String> {
    rest.trim_start().strip_prefix(wanted).ok_or_else(|| format!("expected {wanted:?} at {rest:?}"))
}

fn value(rest: &str) -> Result<(Value, &str), String> {
    if rest.starts_with('"') {
        let (text, after) = text(rest)?;
        return Ok((Value::Text(text), after));
    }
    let end = rest.find([',', '}']).ok_or_else(|| format!("unfinished value {rest:?}"))?;
    let (word, after) = rest.split_at(end);
    let value = match word.trim() {
        "true" => Value::Bool(true),
        "false" => Value::Bool(false),
        "null" => Value::Null,
        number => Value::Number(number.parse().map_err(|_| format!("not a value: {number:?}"))?),
    };
    Ok((value, after))
}

fn text(rest: &str) -> Result<(String, &str), String> {
    let body = rest.strip_prefix('"').ok_or_else(|| format!("expected a string at {rest:?}"))?;
    let mut text = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((text, &body[at + 1..])),
            '\\' => match chars.next() {
                Some((_, c @ ('"' | '\\' | '/'))) => text.push(c),
                Some((_, 'n')) => text.push('\n'),
                Some((_, 't')) => text.push('\t'),
                escape => return Err(format!("unsupported escape {escape:?}")),
            },
            c => text.push(c),
        }
    }
    Err(format!("unfinished string {rest:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_object_is_read() {
        let object = parse_object(
            r#" {"sha256_match":true,"bytes": 12 , "audit":"cle\"an","rate":1.5,"map":null} "#,
        )
        .expect("valid JSON");
        assert_eq!(object["sha256_match"], Value::Bool(true));
        assert_eq!(object["bytes"], Value::Number(12.0));
        assert_eq!(object["audit"], Value::Text("cle\"an".into()));
        assert_eq!(object["rate"], Value::Number(1.5));
        assert_eq!(object["map"], Value::Null);
        assert!(parse_object("{}").expect("valid JSON").is_empty());
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for bad in [
            "",
            "12",
            "{",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":1} x",
            "{\"a\":yes}",
            "{\"a\":1,\"a\":2}",
        ] {
            assert!(parse_object(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
