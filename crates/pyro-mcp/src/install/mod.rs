//! Configuration of MCP hosts: where each keeps it, in which shape, and how an entry gets into it without harm to the
//! rest.

mod json;
mod toml;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The name under which hosts know the server.
const NAME: &str = "pyro";
/// A configuration file larger than this is none, in bytes.
const MOST_BYTES: u64 = 8 << 20;

/// A program that can start the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Host {
    ClaudeCode,
    ClaudeDesktop,
    Codex,
    Cursor,
    VsCode,
    OpenCode,
    /// Any that takes the common `mcpServers` object.
    Generic,
}

/// What is to be installed.
#[derive(Clone, Debug)]
pub struct Installation {
    /// The host.
    pub host: Host,
    /// The `pyro` program, absolute.
    pub program: PathBuf,
    /// What follows it.
    pub arguments: Vec<String>,
}

/// Where an entry was written.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Installed {
    /// The host's file.
    pub file: PathBuf,
    /// Whether it has changed: an entry that was there already leaves it as it is.
    pub changed: bool,
}

/// Why an entry could not be written.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The host keeps it in no file of its own.
    #[error("a generic client has no file of its own")]
    NoFile,
    /// The file cannot be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file is not what it should be, and is left alone.
    #[error("'{}' is not understood ({why}) and was left as it is", file.display())]
    NotUnderstood {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl Host {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::ClaudeCode,
        Self::ClaudeDesktop,
        Self::Codex,
        Self::Cursor,
        Self::VsCode,
        Self::OpenCode,
        Self::Generic,
    ];

    /// The name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClaudeCode => "claude-code",
            Self::ClaudeDesktop => "claude-desktop",
            Self::Codex => "codex",
            Self::Cursor => "cursor",
            Self::VsCode => "vscode",
            Self::OpenCode => "opencode",
            Self::Generic => "generic",
        }
    }

    /// The host's file, given the user's home and configuration directories; none for a generic client.
    pub fn file(self, home: &Path, config: &Path) -> Option<PathBuf> {
        match self {
            Self::ClaudeCode => Some(home.join(".claude.json")),
            Self::ClaudeDesktop => Some(config.join("Claude/claude_desktop_config.json")),
            Self::Codex => Some(home.join(".codex/config.toml")),
            Self::Cursor => Some(home.join(".cursor/mcp.json")),
            Self::VsCode => Some(config.join("Code/User/mcp.json")),
            Self::OpenCode => Some(config.join("opencode/opencode.json")),
            Self::Generic => None,
        }
    }
}

impl Installation {
    /// The configuration that a user would write by hand.
    pub fn snippet(&self) -> String {
        // Into an empty file the entry goes in any case.
        self.put_into("").unwrap_or_default()
    }

    /// Writes the entry into the host's file, which keeps everything else that is in it, comments included. The file is
    /// replaced in one step.
    ///
    /// # Errors
    /// When the file cannot be read or written, or is not what the host would write.
    pub fn write(&self, file: &Path) -> Result<Installed, InstallError> {
        if self.host == Host::Generic {
            return Err(InstallError::NoFile);
        }
        // A link keeps pointing where it points.
        let file = fs_err::canonicalize(file).unwrap_or_else(|_| file.to_owned());
        let before = read(&file)?;
        let edited = self.put_into(&before);
        let after = edited.map_err(|why| InstallError::NotUnderstood { file: file.clone(), why })?;
        let changed = after != before;
        if changed {
            replace(&file, &after)?;
        }
        Ok(Installed { file, changed })
    }

    /// The text of a host's file with the entry in it, or why it cannot be.
    fn put_into(&self, text: &str) -> Result<String, String> {
        if self.host == Host::Codex {
            return toml::with_entry(text, &self.program(), &self.arguments);
        }
        let (section, entry) = self.entry();
        json::with_entry(text, section, NAME, &entry)
    }

    fn program(&self) -> String {
        self.program.to_string_lossy().into_owned()
    }

    /// The section of the file, and the entry in it.
    fn entry(&self) -> (&'static str, Value) {
        let (program, arguments) = (self.program(), &self.arguments);
        match self.host {
            Host::ClaudeCode | Host::VsCode => {
                let section = if self.host == Host::VsCode { "servers" } else { "mcpServers" };
                (section, json!({ "type": "stdio", "command": program, "args": arguments }))
            }
            Host::OpenCode => {
                let words: Vec<&String> = std::iter::once(&program).chain(arguments).collect();
                ("mcp", json!({ "type": "local", "command": words, "enabled": true }))
            }
            Host::ClaudeDesktop | Host::Codex | Host::Cursor | Host::Generic => {
                ("mcpServers", json!({ "command": program, "args": arguments }))
            }
        }
    }
}

fn read(file: &Path) -> Result<String, InstallError> {
    let not_understood =
        |why: &str| InstallError::NotUnderstood { file: file.to_owned(), why: why.to_owned() };
    match fs_err::metadata(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error.into()),
        Ok(found) if !found.is_file() => Err(not_understood("it is no file")),
        Ok(found) if found.len() > MOST_BYTES => Err(not_understood("it is larger than 8 MiB")),
        Ok(_) => match fs_err::read_to_string(file) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(not_understood("it is not UTF-8"))
            }
            read => Ok(read?),
        },
    }
}

fn replace(file: &Path, text: &str) -> Result<(), InstallError> {
    let parent = file.parent().unwrap_or_else(|| Path::new("/"));
    fs_err::create_dir_all(parent)?;
    let mut new = tempfile::NamedTempFile::new_in(parent)?;
    new.write_all(text.as_bytes())?;
    if let Ok(old) = fs_err::metadata(file) {
        new.as_file().set_permissions(old.permissions())?;
    }
    new.as_file().sync_all()?;
    new.persist(file).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn installation(host: Host) -> Installation {
        let arguments = ["mcp", "serve"].map(str::to_owned).to_vec();
        Installation { host, program: "/usr/bin/pyro".into(), arguments }
    }

    #[test]
    fn each_host_gets_its_own_shape_and_a_second_time_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        for host in Host::ALL {
            let Some(file) = host.file(dir.path(), &dir.path().join("config")) else { continue };
            let installation = installation(host);
            let installed = installation.write(&file).expect("written");
            assert!(installed.changed && installed.file.exists(), "{host:?}");
            let text = fs_err::read_to_string(&file).expect("read");
            assert!(text.contains("/usr/bin/pyro") && text.contains("serve"), "{text}");
            if host != Host::Codex {
                let value: Value = serde_json::from_str(&text).expect("JSON");
                let (section, entry) = installation.entry();
                assert_eq!(value[section][NAME], entry);
            }
            assert!(!installation.write(&file).expect("written").changed, "{host:?}: {text}");
        }
    }

    #[test]
    fn everything_else_in_a_file_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        let json = dir.path().join("mcp.json");
        let before = "{\n  // mine\n  \"servers\": {\n    \"other\": {\"command\": \"x\"},\n    \"pyro\": {\"command\": \"old\", \"args\": [], \"env\": {\"X\": \"1\"}}\n  },\n  \"z\": 1, \"a\": 2\n}\n";
        fs_err::write(&json, before).expect("written");
        installation(Host::VsCode).write(&json).expect("edited");
        let after = fs_err::read_to_string(&json).expect("read");
        for kept in
            ["// mine", "\"env\": {\"X\": \"1\"}", "\"other\": {\"command\": \"x\"}", "\"z\": 1, \"a\": 2"]
        {
            assert!(after.contains(kept), "{kept} in {after}");
        }
        assert!(after.contains("/usr/bin/pyro") && !after.contains("\"old\""), "{after}");

        let toml = dir.path().join("config.toml");
        fs_err::write(&toml, "# mine\nmodel = \"m\"\n\n[mcp_servers.other]\ncommand = \"x\"\n")
            .expect("written");
        installation(Host::Codex).write(&toml).expect("edited");
        let after = fs_err::read_to_string(&toml).expect("read");
        assert!(after.contains("# mine\nmodel = \"m\"") && after.contains("[mcp_servers.other]"), "{after}");
        assert!(after.contains("[mcp_servers.pyro]\ncommand = \"/usr/bin/pyro\""), "{after}");
    }

    #[test]
    fn a_file_that_is_not_understood_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        for (host, text) in [
            (Host::Cursor, "{ \"mcpServers\": "),
            (Host::Cursor, "[1, 2]"),
            (Host::Cursor, "{ \"mcpServers\": 3 }"),
            (Host::Codex, "= nothing"),
            (Host::Codex, "mcp_servers = 3"),
        ] {
            let file = dir.path().join("config");
            fs_err::write(&file, text).expect("written");
            let refused = installation(host).write(&file).expect_err("refused");
            assert!(matches!(refused, InstallError::NotUnderstood { .. }), "{refused}");
            assert_eq!(fs_err::read_to_string(&file).expect("read"), text);
        }
    }
}
