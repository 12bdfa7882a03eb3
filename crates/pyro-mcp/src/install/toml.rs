//! An entry in a TOML file.

use toml_edit::{Array, DocumentMut, Item, Table, value};

use super::NAME;

const SECTION: &str = "mcp_servers";

/// The text with the server's entry set.
pub(super) fn with_entry(text: &str, program: &str, arguments: &[String]) -> Result<String, String> {
    let mut document: DocumentMut =
        text.parse().map_err(|error: toml_edit::TomlError| error.message().to_owned())?;
    let servers = document.entry(SECTION).or_insert_with(|| {
        let mut table = Table::new();
        table.set_implicit(true);
        Item::Table(table)
    });
    let servers = servers.as_table_like_mut().ok_or_else(|| format!("'{SECTION}' in it is no table"))?;
    let arguments: Array = arguments.iter().map(String::as_str).collect();
    let entry = servers.entry(NAME).or_insert_with(|| Item::Table(Table::new()));
    let entry = entry.as_table_like_mut().ok_or_else(|| format!("'{SECTION}.{NAME}' in it is no table"))?;
    entry.insert("command", value(program));
    entry.insert("args", value(arguments));
    Ok(document.to_string())
}
