//! `resources/openapi.yaml`, the wire types and the routes, held against each other.

use std::collections::BTreeSet;

use hyper::Method;
use saphyr::{LoadableYamlNode, Yaml};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::routes::{Action, Ask, ENDPOINTS, config_commands, route};
use super::types;
use crate::config;
use crate::control::Command;

/// The document as JSON, which YAML is a superset of.
fn document() -> Value {
    fn convert(node: &Yaml<'_>) -> Value {
        match node {
            Yaml::Mapping(map) => map
                .iter()
                .map(|(key, value)| (key.as_str().unwrap().to_owned(), convert(value)))
                .collect::<Map<_, _>>()
                .into(),
            Yaml::Sequence(list) => list.iter().map(convert).collect(),
            _ if node.is_null() => Value::Null,
            _ => match (node.as_bool(), node.as_integer(), node.as_str()) {
                (Some(value), ..) => value.into(),
                (_, Some(value), _) => value.into(),
                (.., Some(value)) => value.into(),
                _ => panic!("{node:?}"),
            },
        }
    }
    let text = include_str!("../../resources/openapi.yaml");
    convert(&Yaml::load_from_str(text).unwrap()[0])
}

fn strings(list: &Value) -> BTreeSet<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Follows a reference.
fn resolve<'d>(document: &'d Value, schema: &'d Value) -> &'d Value {
    match schema["$ref"].as_str() {
        Some(reference) => document.pointer(reference.trim_start_matches('#')).unwrap(),
        None => schema,
    }
}

/// A legal value of a schema, every property there.
fn sample(document: &Value, schema: &Value) -> Value {
    let schema = resolve(document, schema);
    if let Some(value) =
        schema.get("default").or_else(|| schema.get("enum").or(schema.get("examples")).map(|values| &values[0]))
    {
        return value.clone();
    }
    if let Some(examples) = schema.get("examples") {
        return examples[0].clone();
    }
    if let Some(schema) = schema.get("oneOf") {
        return sample(document, &schema[0]);
    }
    if schema.get("type").is_none() {
        return json!({});
    }
    let kind = if schema["type"].is_array() { &schema["type"][0] } else { &schema["type"] };
    match kind.as_str().unwrap() {
        "object" => {
            let properties = schema["properties"].as_object().into_iter().flatten();
            // What is deprecated has a successor, and both at once may contradict each other.
            let current = properties.filter(|(_, schema)| schema["deprecated"] != true);
            current.map(|(name, schema)| (name.clone(), sample(document, schema))).collect::<Map<_, _>>().into()
        }
        "array" if schema["maxItems"] == 0 => json!([]),
        "array" => json!([sample(document, &schema["items"])]),
        "string" => json!("a"),
        "integer" => schema["minimum"].clone(),
        "boolean" => json!(true),
        "null" => Value::Null,
        other => panic!("{other}"),
    }
}

fn nullable(document: &Value, schema: &Value) -> bool {
    let schema = resolve(document, schema);
    let kinds = [&schema["type"], &schema["type"][1], &schema["oneOf"][1]["type"]];
    kinds.into_iter().any(|kind| kind == "null")
}

/// The names in backquotes after "expected": what serde would have liked.
fn expected(error: &str) -> BTreeSet<&str> {
    let (_, list) = error.split_once("expected").unwrap();
    list.split('`').skip(1).step_by(2).collect()
}

/// Holds a schema against the type of the same meaning.
fn check<T: DeserializeOwned>(name: &str) {
    let document = document();
    let schema = &document["components"]["schemas"][name];
    let refusal = |value: Value| serde_json::from_value::<T>(value).err().map(|error| error.to_string());
    let with = |field: &str, value: Value| {
        let mut body = sample(&document, schema);
        body[field] = value;
        refusal(body)
    };

    assert_eq!(schema["additionalProperties"], false, "{name}");
    assert_eq!(refusal(sample(&document, schema)), None, "{name}");
    let properties = schema["properties"].as_object().unwrap();
    let names: BTreeSet<_> = properties.keys().map(String::as_str).collect();
    assert_eq!(expected(&with("\u{1}", Value::Null).unwrap()), names, "{name}");
    for (field, property) in properties {
        let mut body = sample(&document, schema);
        body.as_object_mut().unwrap().remove(field);
        let required = strings(&schema["required"]).contains(field.as_str());
        assert_eq!(refusal(body).is_some(), required, "{name}.{field} left out");
        // A response's field that is left out instead of being null may still be read as null.
        let lenient = name == "LifecycleEvent";
        assert_eq!(
            with(field, Value::Null).is_none(),
            lenient && !required || nullable(&document, property),
            "{name}.{field} null"
        );
        if let Some(variants) = resolve(&document, property).get("enum") {
            assert_eq!(expected(&with(field, json!("\u{1}")).unwrap()), strings(variants), "{name}.{field}");
        }
    }
}

#[test]
fn every_schema_is_its_type() {
    macro_rules! check_all {
        ($($name:ident)+) => { [$((stringify!($name), check::<types::$name> as fn(&str))),+] };
    }
    let checks = check_all! {
        CpuConfig CpuidLeafModifier CpuidRegisterModifier MsrModifier Error InstanceInfo Version InstanceAction Vm BootSource MachineConfiguration MachineConfigurationUpdate
        Drive PartialDrive NetworkInterface PartialNetworkInterface RateLimiter TokenBucket Vsock SerialDevice Logger Metrics
        MmdsConfig FullVmConfiguration LifecycleEvent SnapshotCreateParams SnapshotLoadParams SnapshotResetParams MemoryBackend
        NetworkOverride VsockOverride DriveOverride Overlay
    };
    for (name, check) in checks {
        check(name);
    }
    let document = document();
    let objects = document["components"]["schemas"].as_object().unwrap().iter();
    let objects: BTreeSet<_> =
        objects.filter(|(_, schema)| schema["type"] == "object").map(|(name, _)| name.as_str()).collect();
    assert_eq!(objects, checks.iter().map(|(name, _)| *name).collect());
}

#[test]
fn every_endpoint_is_in_the_document_and_every_operation_is_served() {
    let document = document();
    let mut operations = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            operations.insert((method.to_uppercase(), path.clone()));
        }
    }
    let served = ENDPOINTS.iter().map(|endpoint| (endpoint.method.to_string(), format!("/{}", endpoint.path)));
    assert_eq!(operations, served.collect());
}

#[test]
fn every_operation_takes_the_body_it_documents() {
    let document = document();
    for endpoint in ENDPOINTS {
        let method = endpoint.method.as_str().to_lowercase();
        let operation = &document["paths"][format!("/{}", endpoint.path)][method];
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let (prefix, id) = endpoint.path.split_once('{').unwrap_or((endpoint.path, ""));
        let path = format!("/{prefix}{}", if id.is_empty() { "" } else { "a" });
        if endpoint.method == Method::GET {
            assert!(schema.is_null(), "{path}");
            route(&endpoint.method, &path, b"").unwrap();
            assert!(operation["responses"]["200"].is_object(), "{path}");
            continue;
        }
        assert_eq!(operation["requestBody"]["required"], true, "{path}");
        let body = sample(&document, schema).to_string();
        let action =
            route(&endpoint.method, &path, body.as_bytes()).unwrap_or_else(|error| panic!("{path} {body}: {error}"));
        assert!(matches!(action, Action::Ask(_)));
        assert!(operation["responses"]["204"].is_object(), "{path}");
        // No two bodies are the same: another schema's would be refused.
        for other in ["Error", "Version"].into_iter().filter(|_| resolve(&document, schema).get("type").is_some()) {
            let body = sample(&document, &document["components"]["schemas"][other]).to_string();
            route(&endpoint.method, &path, body.as_bytes()).unwrap_err();
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn visit(document: &Value, node: &Value) {
        assert!(!resolve(document, node).is_null());
        match node {
            Value::Object(map) => map.values().for_each(|child| visit_child(document, child)),
            Value::Array(list) => list.iter().for_each(|child| visit_child(document, child)),
            _ => {}
        }
    }
    fn visit_child(document: &Value, child: &Value) {
        if child.is_object() || child.is_array() {
            visit(document, child);
        }
    }
    let document = document();
    visit(&document, &document);
}

#[test]
fn the_limits_in_the_document_are_the_limits() {
    let document = document();
    assert_eq!(document["info"]["version"], super::API_VERSION);
    let schemas = &document["components"]["schemas"];
    for name in ["MachineConfiguration", "MachineConfigurationUpdate"] {
        assert_eq!(schemas[name]["properties"]["vcpu_count"]["maximum"], config::MAX_VCPUS);
        assert_eq!(schemas[name]["properties"]["mem_size_mib"]["maximum"], config::MAX_MEM_SIZE_MIB);
    }
    assert_eq!(schemas["BootSource"]["properties"]["boot_args"]["maxLength"], config::MAX_CMDLINE);
    assert_eq!(schemas["BootSource"]["properties"]["boot_args"]["default"], config::DEFAULT_BOOT_ARGS);
}

/// What a schema allows at its edges, and what lies beyond them.
#[derive(Default)]
struct Edges {
    legal: Vec<Value>,
    illegal: Vec<Value>,
}

fn edges(document: &Value, schema: &Value) -> Edges {
    let mut edges = Edges::default();
    for (bound, beyond) in [("minimum", -1), ("maximum", 1)] {
        if let Some(number) = schema[bound].as_i64() {
            edges.legal.push(number.into());
            edges.illegal.push((number + beyond).into());
        }
    }
    if let Some(length) = schema["maxLength"].as_u64() {
        edges.legal.push("a".repeat(length as usize).into());
        edges.illegal.push("a".repeat(length as usize + 1).into());
    }
    if schema["pattern"].is_string() {
        edges.illegal.extend(["".into(), "\u{e9}".into()]);
    }
    if schema["minItems"] == 1 {
        edges.illegal.push(json!([]));
    }
    if let Some(count) = schema["maxItems"].as_u64() {
        edges.illegal.push(vec![json!({}); count as usize + 1].into());
    }
    if schema["minProperties"].is_u64() {
        let mut least = sample(document, schema);
        least.as_object_mut().unwrap().retain(|name, _| strings(&schema["required"]).contains(name.as_str()));
        edges.illegal.push(least);
    }
    edges
}

/// Tries the edges of a schema and of all within it, each in a body that is legal but for it; returns how many.
fn try_edges(document: &Value, schema: &Value, at: &str, body: &Value, accepts: &dyn Fn(&Value) -> bool) -> usize {
    let schema = resolve(document, schema);
    if let Some(schemas) = schema.get("oneOf") {
        return try_edges(document, &schemas[0], at, body, accepts);
    }
    let Edges { legal, illegal } = edges(document, schema);
    let mut tried = legal.len() + illegal.len();
    let all = legal.into_iter().map(|value| (value, true)).chain(illegal.into_iter().map(|value| (value, false)));
    for (value, expected) in all {
        let mut changed = body.clone();
        *changed.pointer_mut(at).unwrap() = value.clone();
        assert_eq!(accepts(&changed), expected, "{at:?} {value}");
    }
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        let at = format!("{at}/{name}");
        if body.pointer(&at).is_some() {
            tried += try_edges(document, schema, &at, body, accepts);
        }
    }
    let first = format!("{at}/0");
    if body.pointer(&first).is_some() {
        tried += try_edges(document, &schema["items"], &first, body, accepts);
    }
    tried
}

#[test]
fn what_lies_at_the_edge_of_the_document_is_accepted_and_what_lies_beyond_refused() {
    let document = document();
    let mut tried = 0;
    for endpoint in ENDPOINTS.iter().filter(|endpoint| endpoint.method != Method::GET) {
        let operation = &document["paths"][format!("/{}", endpoint.path)][endpoint.method.as_str().to_lowercase()];
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let path = format!("/{}", endpoint.path.replace("{drive_id}", "a").replace("{iface_id}", "a"));
        let accepts = |body: &Value| match route(&endpoint.method, &path, body.to_string().as_bytes()) {
            // Whether an update is legal depends on what it changes.
            Ok(Action::Ask(Ask { command: Command::PatchMachine(update), .. })) => {
                update.apply(&config::MachineConfig::default()).is_ok()
            }
            answer => answer.is_ok(),
        };
        tried += try_edges(&document, schema, "", &sample(&document, schema), &accepts);
    }
    let file = &document["components"]["schemas"]["FullVmConfiguration"];
    let accepts = |body: &Value| config_commands(body.to_string().as_bytes()).is_ok();
    tried += try_edges(&document, file, "", &sample(&document, file), &accepts);
    assert!(tried > 100, "{tried}");
}
