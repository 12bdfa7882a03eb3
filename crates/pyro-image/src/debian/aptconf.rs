//! The few settings of the host's apt that decide whether it reaches its archive.

use std::path::Path;

use crate::tool::Tools;

/// Names, or beginnings of names, that are forwarded. All others stay on the host.
const EXACT: &[&str] = &[
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
    "Acquire::Max-FutureTime",
    "Acquire::Max-ValidTime",
    "Acquire::Retries",
    "Acquire::ForceIPv4",
    "Acquire::ForceIPv6",
];
const PREFIXES: &[&str] = &["Acquire::http::", "Acquire::https::"];

/// The host's settings as options for `mmdebstrap --aptopt`; none when apt cannot be asked.
pub(super) fn host_options(tools: &Tools, cwd: &Path) -> Vec<String> {
    let Ok(mut spawn) = tools.plain("apt-config", cwd) else { return Vec::new() };
    spawn.arg("dump");
    match pyro_process::output(spawn) {
        Ok(output) if output.status.success() => select(&String::from_utf8_lossy(&output.stdout)),
        _ => Vec::new(),
    }
}

fn select(dump: &str) -> Vec<String> {
    let mut options: Vec<String> = dump
        .lines()
        .filter_map(|line| {
            let (key, value) = line.trim().strip_suffix("\";")?.split_once(" \"")?;
            let wanted = EXACT.iter().any(|name| key.eq_ignore_ascii_case(name))
                || PREFIXES.iter().any(|prefix| starts_with_ignoring_case(key, prefix));
            // A value with a quote could end its own setting and begin another.
            let plain =
                !value.is_empty() && !value.contains(['"', '\\']) && !value.contains(char::is_control);
            let named = key.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_:./".contains(letter));
            (wanted && plain && named).then(|| format!("{key} \"{value}\""))
        })
        .collect();
    options.dedup();
    options
}

fn starts_with_ignoring_case(text: &str, prefix: &str) -> bool {
    text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_decides_about_reaching_the_archive_is_forwarded() {
        let dump = "APT::Architecture \"amd64\";\nAcquire \"\";\nAcquire::Check-Valid-Until \"false\";\n\
                    Acquire::http::Proxy \"http://p:3128/\";\nAcquire::https \"\";\n\
                    Acquire::http::Evil \"a\"; Dir \"x\";\nDPkg::Post-Invoke:: \"rm -rf /\";\n";
        assert_eq!(
            select(dump),
            ["Acquire::Check-Valid-Until \"false\"", "Acquire::http::Proxy \"http://p:3128/\""]
        );
    }
}
