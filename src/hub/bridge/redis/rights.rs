//! What an error of Redis means: that it is away, that it refuses for now, or that its user lacks a right, and which.

use redis::RedisError;

use crate::error::{Error, ErrorKind};

/// In the text of errors that pass by themselves, or when somebody makes room: out of memory, a disk that cannot be
/// written, too few replicas. Read as text, because of what fails in a script or a transaction Redis and the client
/// give the code there.
const PASSING: [&str; 3] = ["command not allowed when used memory", "MISCONF", "NOREPLICAS"];
/// In the text of errors over what the user may not do, or who it is.
const FORBIDDEN: [&str; 7] = [
    "NOPERM",
    "NoPerm",
    "can't run this command",
    "AuthenticationFailed",
    "WRONGPASS",
    "NOAUTH",
    "DB index is out of range",
];

/// What happened, in an error that tells whether the bus is away or refuses; `script` is the one that failed, if one did.
pub(super) fn failure(what: &str, error: &RedisError, script: &str) -> Error {
    let text = error.to_string();
    let refuses = any(&PASSING, &text) || any(&FORBIDDEN, &text);
    let kind = if refuses { ErrorKind::BusRefused } else { ErrorKind::BusDown };
    let right = missing(&text, script).filter(|_| any(&FORBIDDEN, &text));
    let advice = right.map_or_else(String::new, |right| format!("; the user lacks the right to run {right}"));
    Error::new(kind, format!("{what}: {text}{advice}"))
}

/// Whether trying the same again later is all that can be done.
pub(super) fn is_passing(error: &RedisError) -> bool {
    any(&PASSING, &error.to_string())
}

fn any(known: &[&str], text: &str) -> bool {
    known.iter().any(|known| text.contains(known))
}

/// The command in the line of the script that the error names: Redis before 7.2 does not say which one it was, and names
/// the line behind it, Redis 6.2 before it.
fn missing<'a>(text: &str, script: &'a str) -> Option<&'a str> {
    const LINE: &str = "user_script:";
    let told = FORBIDDEN.iter().filter_map(|known| text.find(known)).min()?;
    let (before, behind) = text.split_at(told);
    let (_, rest) = behind.split_once(LINE).or_else(|| before.rsplit_once(LINE))?;
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    let line = script.lines().nth(digits.parse::<usize>().ok()?.checked_sub(1)?)?;
    let (_, called) = line.split_once("call('")?;
    called.split_once('\'').map(|(command, _)| command)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRIPT: &str = "local a = 1\nlocal b = redis.call('XADD', KEYS[1])\nreturn b";

    #[test]
    fn the_right_that_is_missing_is_named() {
        for told in [
            "The user executing the script can't run this command or subcommand script: 3f, on @user_script:2.",
            "@user_script: 2: @user_script: 2: The user executing the script can't run this command or subcommand",
            "(0: can't run this command script: 3f, on @user_script:2.), (1: ERR the ID is smaller, on @user_script:3.)",
        ] {
            assert_eq!(missing(told, SCRIPT), Some("XADD"), "{told}");
        }
        for other in ["", "user_script:2.", "NOPERM user_script:99", "NOPERM user_script:x", "NOPERM run 'subscribe'"] {
            assert_eq!(missing(other, SCRIPT), None, "{other}");
        }
    }
}
