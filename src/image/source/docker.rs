//! Docker archives: `manifest.json` names the configuration and the layers of each image.
#![forbid(unsafe_code)]

use serde::Deserialize;

use super::config::ConfigFile;
use super::files::Files;
use super::{Found, MAX_LAYERS, SourceError, SourceLayer};
use crate::image::digest::Digest;
use crate::image::layer::stream::Expected;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Item {
    fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

/// Finds the image of `tag`, or the only one.
pub(super) fn resolve(files: &Files, tag: Option<&str>) -> Result<Found, SourceError> {
    let items: Vec<Item> = files.parse("manifest.json", &files.json("manifest.json")?)?;
    let item = choose(files, &items, tag)?;
    let bytes = match named_digest(&item.config) {
        Some(digest) => files.verified_json(&item.config, digest)?,
        None => files.json(&item.config)?,
    };
    let config: ConfigFile = files.parse(&item.config, &bytes)?;
    if (config.os.as_str(), config.architecture.as_str()) != ("linux", "amd64") {
        let (os, architecture) = (&config.os, &config.architecture);
        return Err(files.unfit(format!("is for {os}/{architecture}; Cube runs linux/amd64")));
    }
    let names = item.layers.as_deref().unwrap_or_default();
    let diff_ids = &config.rootfs.diff_ids;
    if names.len() != diff_ids.len() || names.len() > MAX_LAYERS {
        let fault = format!(
            "it names {} layers, of 1,000 at most, and the configuration has {}",
            names.len(),
            diff_ids.len()
        );
        return Err(files.malformed("manifest.json", fault));
    }
    let layers = names.iter().zip(diff_ids).map(|(name, diff_id)| {
        let diff_id = files.digest(&item.config, diff_id)?;
        let expected = Expected {
            blob: named_digest(name),
            size: None,
            diff_id,
        };
        Ok(SourceLayer {
            name: name.clone(),
            expected,
        })
    });
    let layers = layers.collect::<Result<_, _>>()?;
    let reference = match tag {
        Some(tag) => item.tags().iter().find(|name| matches_tag(name, tag)),
        None => item.tags().first(),
    };
    Ok(Found {
        digest: Digest::of(&bytes),
        reference: reference.cloned(),
        config,
        layers,
    })
}

fn choose<'a>(
    files: &Files,
    items: &'a [Item],
    tag: Option<&str>,
) -> Result<&'a Item, SourceError> {
    match (tag, items) {
        (Some(tag), _) => items
            .iter()
            .find(|item| item.tags().iter().any(|name| matches_tag(name, tag)))
            .ok_or_else(|| files.unfit(format!("has nothing with the tag `{tag}`"))),
        (None, [item]) => Ok(item),
        (None, []) => Err(files.unfit("holds no image")),
        (None, _) => {
            let tags: Vec<_> = items
                .iter()
                .flat_map(Item::tags)
                .map(String::as_str)
                .collect();
            Err(files.unfit(format!(
                "holds several images: write a colon and a tag after the path, one of {}",
                tags.join(", ")
            )))
        }
    }
}

fn matches_tag(name: &str, tag: &str) -> bool {
    name == tag || name.rsplit_once(':').is_some_and(|(_, last)| last == tag)
}

/// The digest that a file's name states: `<hex>.json` for configurations, and in the archives that are
/// OCI layouts too `blobs/sha256/<hex>` for everything.
fn named_digest(name: &str) -> Option<Digest> {
    let last = name
        .strip_suffix(".json")
        .or_else(|| name.strip_prefix("blobs/sha256/"))?;
    Digest::from_hex(last.rsplit('/').next()?).ok()
}
