//! The OpenAPI 3.1 document, made from the same descriptors as the routes: paths, schemas, and the .proto comments as
//! their descriptions. Made once, at start.

use std::collections::{BTreeMap, HashMap};

use prost_reflect::{
    DescriptorPool, EnumDescriptor, ExtensionDescriptor, FieldDescriptor, Kind, MessageDescriptor, Value as ProtoValue,
};
use serde_json::{Map, Value, json};

use crate::{
    contract::{Contract, Route},
    webhook,
};

/// `google.api.FieldBehavior`, as far as it says something here.
const REQUIRED: i32 = 2;
const OUTPUT_ONLY: i32 = 3;

/// What needs no token.
const FOR_ANYONE: [&str; 3] = ["GetSale", "ListSales", "WatchSale"];

/// The document, encoded.
pub fn document(contract: &Contract) -> Vec<u8> {
    let mut writer = Writer {
        comments: comments(contract.pool()),
        behavior: contract.pool().get_extension_by_name("google.api.field_behavior"),
        schemas: BTreeMap::new(),
    };
    let mut paths = BTreeMap::<&str, Map<String, Value>>::new();
    for route in contract.routes() {
        let operation = writer.operation(route);
        paths.entry(&route.template).or_default().insert(route.method.as_str().to_ascii_lowercase(), operation);
    }
    paths.entry(webhook::PATH).or_default().insert("post".to_owned(), webhook_operation());
    writer.schemas.insert("Error".to_owned(), error_schema());
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Seckill",
            "version": "v1",
            "description": "Flash sales. The same rpcs are served over gRPC on the same port. Unknown fields and query \
                parameters are refused; 64-bit integers are strings in answers.",
        },
        "paths": paths,
        "components": {
            "schemas": writer.schemas,
            "securitySchemes": { "bearer": {
                "type": "http",
                "scheme": "bearer",
                "bearerFormat": "JWT",
                "description": "`sub` is the buyer; `scope` holds `buyer`, `operator` or both.",
            } },
        },
    });
    document.to_string().into_bytes()
}

/// Comments by file and path, as `protoc` numbers paths.
type Comments = HashMap<(String, Vec<i32>), String>;

struct Writer {
    comments: Comments,
    behavior: Option<ExtensionDescriptor>,
    /// By name, of the messages and enums that were met on the way.
    schemas: BTreeMap<String, Value>,
}

impl Writer {
    fn operation(&mut self, route: &Route) -> Value {
        let rpc = &route.rpc;
        let comment = self.comment(rpc.parent_file().name(), rpc.path());
        let mut operation = json!({
            "operationId": rpc.name(),
            "tags": [rpc.parent_service().name()],
            "summary": comment.split_inclusive(['.', '\n']).next().unwrap_or_default().trim(),
            "description": comment,
            "parameters": self.parameters(route),
            "responses": self.responses(route),
            "security": if FOR_ANYONE.contains(&rpc.name()) { json!([{}, { "bearer": [] }]) } else { json!([{ "bearer": [] }]) },
        });
        if route.has_body {
            let in_path: Vec<_> = route.path_fields().map(FieldDescriptor::number).collect();
            let schema = self.object(&route.input, |field| !in_path.contains(&field.number()));
            let required = schema["required"].as_array().is_some_and(|required| !required.is_empty());
            operation["requestBody"] =
                json!({ "required": required, "content": { "application/json": { "schema": schema } } });
        }
        operation
    }

    fn parameters(&mut self, route: &Route) -> Vec<Value> {
        let mut parameters = Vec::new();
        for field in route.path_fields() {
            parameters.push(self.parameter(field, "path", field.name(), true));
        }
        for field in route.query_fields() {
            let required = self.behaves(&field, REQUIRED);
            parameters.push(self.parameter(&field, "query", field.json_name(), required));
        }
        if let Some(field) = route.request_id.as_ref().filter(|_| route.has_body) {
            // Required only by the field, which may also be given in the body.
            parameters.push(self.parameter(field, "header", "Idempotency-Key", false));
        }
        parameters
    }

    fn parameter(&mut self, field: &FieldDescriptor, place: &str, name: &str, required: bool) -> Value {
        json!({
            "name": name,
            "in": place,
            "required": required,
            "description": self.comment(field.parent_message().parent_file().name(), field.path()),
            "schema": self.kind(&field.kind()),
        })
    }

    fn responses(&mut self, route: &Route) -> Value {
        let schema = self.kind(&Kind::Message(route.output.clone()));
        let kind = if route.rpc.is_server_streaming() { "text/event-stream" } else { "application/json" };
        let content = json!({ kind: { "schema": schema } });
        let mut responses = json!({
            "200": { "description": if route.rpc.is_server_streaming() {
                "Server-sent events; the data of each is one of these."
            } else {
                "Done."
            }, "content": content },
            "default": {
                "description": "Refused or failed.",
                "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } },
            },
        });
        if route.accepts {
            responses["202"] =
                json!({ "description": "Accepted: the order is PLACED, and locked soon.", "content": content });
        }
        responses
    }

    /// An object schema of the fields that `wanted` lets through.
    fn object(&mut self, message: &MessageDescriptor, wanted: impl Fn(&FieldDescriptor) -> bool) -> Value {
        let (mut properties, mut required) = (Map::new(), Vec::new());
        for field in message.fields().filter(wanted) {
            let mut schema = self.kind(&field.kind());
            if field.is_list() {
                schema = json!({ "type": "array", "items": schema });
            }
            let comment = self.comment(message.parent_file().name(), field.path());
            if !comment.is_empty() {
                schema["description"] = comment.into();
            }
            if self.behaves(&field, OUTPUT_ONLY) {
                schema["readOnly"] = true.into();
            }
            // Over HTTP the header may give it instead.
            if self.behaves(&field, REQUIRED) && field.name() != "request_id" {
                required.push(field.json_name().to_owned());
            }
            properties.insert(field.json_name().to_owned(), schema);
        }
        let comment = self.comment(message.parent_file().name(), message.path());
        json!({ "type": "object", "description": comment, "properties": properties, "required": required, "additionalProperties": false })
    }

    fn kind(&mut self, kind: &Kind) -> Value {
        match kind {
            Kind::Double | Kind::Float => json!({ "type": "number" }),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => json!({ "type": "integer", "format": "int32" }),
            Kind::Uint32 | Kind::Fixed32 => json!({ "type": "integer", "format": "int64", "minimum": 0 }),
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                json!({ "type": ["string", "integer"], "format": "int64", "pattern": "^-?[0-9]+$" })
            }
            Kind::Uint64 | Kind::Fixed64 => {
                json!({ "type": ["string", "integer"], "format": "uint64", "pattern": "^[0-9]+$" })
            }
            Kind::Bool => json!({ "type": "boolean" }),
            Kind::String => json!({ "type": "string" }),
            Kind::Bytes => json!({ "type": "string", "contentEncoding": "base64" }),
            Kind::Message(message) => match message.full_name() {
                "google.protobuf.Timestamp" => json!({ "type": "string", "format": "date-time" }),
                "google.protobuf.Duration" => json!({ "type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$" }),
                _ => self.named(message.name(), |writer| writer.object(message, |_| true)),
            },
            Kind::Enum(of) => self.named(of.name(), |writer| writer.choice(of)),
        }
    }

    /// A reference to a schema of this name, made where it is missing.
    fn named(&mut self, name: &str, make: impl FnOnce(&mut Self) -> Value) -> Value {
        if !self.schemas.contains_key(name) {
            // Noted before it is made, for messages that contain themselves.
            self.schemas.insert(name.to_owned(), Value::Null);
            let schema = make(self);
            self.schemas.insert(name.to_owned(), schema);
        }
        json!({ "$ref": format!("#/components/schemas/{name}") })
    }

    fn choice(&self, of: &EnumDescriptor) -> Value {
        let file = of.parent_file();
        let mut description = self.comment(file.name(), of.path());
        for value in of.values() {
            let comment = self.comment(file.name(), value.path());
            if !comment.is_empty() {
                description.push_str(&format!("\n\n{}: {comment}", value.name()));
            }
        }
        let names: Vec<_> = of.values().map(|value| value.name().to_owned()).collect();
        json!({ "type": "string", "description": description.trim(), "enum": names })
    }

    fn comment(&self, file: &str, path: &[i32]) -> String {
        self.comments.get(&(file.to_owned(), path.to_vec())).cloned().unwrap_or_default()
    }

    fn behaves(&self, field: &FieldDescriptor, behavior: i32) -> bool {
        let Some(extension) = &self.behavior else { return false };
        let options = field.options();
        let said = options.get_extension(extension);
        said.as_list().is_some_and(|list| list.contains(&ProtoValue::EnumNumber(behavior)))
    }
}

fn comments(pool: &DescriptorPool) -> Comments {
    let mut comments = HashMap::new();
    for file in pool.files() {
        for location in file.file_descriptor_proto().source_code_info.iter().flat_map(|info| &info.location) {
            let lines = location.leading_comments().lines().map(str::trim).collect::<Vec<_>>();
            let text = lines.join(" ").trim().to_owned();
            if !text.is_empty() {
                comments.insert((file.name().to_owned(), location.path.clone()), text);
            }
        }
    }
    comments
}

fn error_schema() -> Value {
    json!({
        "type": "object",
        "description": "Every error. The reason in the ErrorInfo detail is what to decide by.",
        "required": ["error"],
        "properties": { "error": {
            "type": "object",
            "required": ["code", "status", "message", "details"],
            "properties": {
                "code": { "type": "integer", "description": "The HTTP status." },
                "status": { "type": "string", "description": "The gRPC code, e.g. RESOURCE_EXHAUSTED." },
                "message": { "type": "string" },
                "details": {
                    "type": "array",
                    "description": "google.rpc.ErrorInfo always; RetryInfo when trying again may help; BadRequest with the field at fault.",
                    "items": { "type": "object", "required": ["@type"], "properties": { "@type": { "type": "string" } } },
                },
            },
        } },
    })
}

fn webhook_operation() -> Value {
    json!({
        "operationId": "ReceivePaymentWebhook",
        "tags": ["Payments"],
        "summary": "The payment provider's webhook.",
        "parameters": [{
            "name": "Seckill-Signature",
            "in": "header",
            "required": true,
            "description": "t=<unix seconds>,v1=<hex HMAC-SHA256 of t.body>",
            "schema": { "type": "string" },
        }],
        "requestBody": { "required": true, "content": { "application/json": { "schema": { "type": "object" } } } },
        "responses": {
            "200": { "description": "Taken.", "content": { "application/json": { "schema": { "type": "object" } } } },
            "default": {
                "description": "Refused or failed.",
                "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Error" } } },
            },
        },
        "security": [],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described_with_its_comment_and_every_reference_leads_somewhere() {
        let contract = Contract::load().unwrap();
        let document: Value = serde_json::from_slice(&document(&contract)).unwrap();
        for route in contract.routes() {
            let operation = &document["paths"][&*route.template][route.method.as_str().to_ascii_lowercase()];
            assert_eq!(operation["operationId"], route.rpc.name());
            assert!(!operation["summary"].as_str().unwrap().is_empty(), "{} has no comment", route.rpc.name());
        }
        let described: usize =
            document["paths"].as_object().unwrap().values().map(|p| p.as_object().unwrap().len()).sum();
        assert_eq!(described, contract.routes().len() + 1, "the routes and the webhook, nothing else");

        let text = document.to_string();
        for reference in text.split("\"#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
    }

    #[test]
    fn fields_are_where_requests_have_them() {
        let document: Value = serde_json::from_slice(&document(&Contract::load().unwrap())).unwrap();
        let names = |operation: &Value| -> Vec<String> {
            let parameters = operation["parameters"].as_array().unwrap();
            parameters
                .iter()
                .map(|p| format!("{}:{}", p["in"].as_str().unwrap(), p["name"].as_str().unwrap()))
                .collect()
        };
        let place = &document["paths"]["/v1/orders"]["post"];
        assert_eq!(names(place), ["header:Idempotency-Key"]);
        let body = &place["requestBody"]["content"]["application/json"]["schema"];
        assert_eq!(body["required"], json!(["sale", "quantity"]));
        assert!(place["responses"]["202"].is_object());
        assert_eq!(names(&document["paths"]["/v1/orders/{order}"]["get"]), ["path:order", "query:wait"]);
        assert_eq!(names(&document["paths"]["/v1/orders"]["get"]), ["query:pageSize", "query:pageToken", "query:sale"]);
        let pay = &document["paths"]["/v1/orders/{order}:pay"]["post"];
        assert!(pay["requestBody"]["content"]["application/json"]["schema"]["properties"]["order"].is_null());
        assert_eq!(document["components"]["schemas"]["Sale"]["properties"]["state"]["readOnly"], true);
    }
}
