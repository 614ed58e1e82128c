// Twenty calls of the OpenAI JavaScript client.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import path from "node:path";

// The package is in a folder of its own: CLIENT_HOME.
const require = createRequire(path.join(process.env.CLIENT_HOME, "x.js"));
const { default: OpenAI } = require("openai");
const { VERSION: version } = require("openai/version");

const { PLAIN_URL, TOOLS_URL, CLIENT_KEY = "none", CLIENT_MODEL: model } = process.env;
const client = new OpenAI({ baseURL: `${PLAIN_URL}/v1`, apiKey: CLIENT_KEY, maxRetries: 0 });
const withTools = new OpenAI({ baseURL: `${TOOLS_URL}/v1`, apiKey: CLIENT_KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city",
    parameters: { type: "object", properties: { city: { type: "string", enum: ["Hanoi", "Paris"] } }, required: ["city"], additionalProperties: false },
  },
};
const person = { type: "object", properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer" } }, required: ["name", "age"], additionalProperties: false };
const done = [];

async function call(name, work) {
  try {
    const value = await work();
    done.push({ call: name, ok: true });
    return value;
  } catch (error) {
    console.error(name, error);
    done.push({ call: name, ok: false, said: String(error).slice(0, 300) });
  }
}

const chat = (fields = {}, who = client) => who.chat.completions.create({ model, messages, max_tokens: 24, ...fields });

async function text(answer) {
  const { choices, usage } = await answer;
  assert.ok(choices[0].message.content);
  assert.ok(usage.completion_tokens > 0);
  return choices[0].message;
}

async function streamed(fields = {}) {
  const chunks = [];
  for await (const chunk of await chat({ stream: true, ...fields })) chunks.push(chunk);
  assert.ok(chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join(""));
  return chunks;
}

async function called(tool_choice) {
  const answer = await chat({ tools: [weather], tool_choice, max_tokens: 100 }, withTools);
  const [found] = answer.choices[0].message.tool_calls;
  assert.ok(["Hanoi", "Paris"].includes(JSON.parse(found.function.arguments).city));
  return answer.choices[0].message;
}

await call("models.list", async () => assert.equal((await client.models.list()).data[0].id, model));
await call("models.retrieve", async () => assert.equal((await client.models.retrieve(model)).id, model));
await call("chat", () => text(chat()));
await call("chat, every default said", () =>
  text(chat({ n: 1, stop: null, logit_bias: {}, store: false, tools: [], tool_choice: "none", parallel_tool_calls: false, metadata: {}, service_tier: "auto", modalities: ["text"], user: "me", logprobs: false, response_format: { type: "text" } })));
await call("chat, streamed", () => streamed());
await call("chat, streamed with usage", async () => assert.ok((await streamed({ stream_options: { include_usage: true } })).at(-1).usage.total_tokens));
await call("chat, goes on with the answer as it came", async () => text(chat({ messages: [...messages, await text(chat()), { role: "user", content: [{ type: "text", text: "Italy?" }] }] })));
await call("chat, seed", async () => {
  const [one, two] = [await text(chat({ temperature: 1, seed: 7 })), await text(chat({ temperature: 1, seed: 7 }))];
  assert.equal(one.content, two.content);
});
await call("chat, stop and max_completion_tokens", async () => {
  const answer = await chat({ max_tokens: undefined, max_completion_tokens: 24, stop: ["Paris"] });
  assert.ok(!answer.choices[0].message.content?.includes("Paris"));
});
await call("chat, logprobs", async () => assert.equal((await chat({ logprobs: true, top_logprobs: 3 })).choices[0].logprobs.content[0].top_logprobs.length, 3));
await call("chat, json_object", async () => {
  const [choice] = (await chat({ max_tokens: 200, temperature: 0, response_format: { type: "json_object" } })).choices;
  assert.ok(choice.finish_reason === "length" || JSON.parse(choice.message.content));
});
const wanted = { type: "json_schema", json_schema: { name: "person", strict: true, schema: person } };
await call("chat, json_schema", async () => assert.equal(typeof JSON.parse((await chat({ max_tokens: 300, response_format: wanted })).choices[0].message.content).age, "number"));
await call("chat.stream, with its events", async () => {
  let pieces = 0;
  const stream = client.chat.completions.stream({ model, messages, max_tokens: 24 }).on("content", () => pieces++);
  assert.ok(await stream.finalContent());
  assert.ok(pieces > 0);
});
await call("chat, four at once", () => Promise.all([1, 2, 3, 4].map(() => text(chat({ max_tokens: 8 })))));
await call("completions", async () => assert.ok((await client.completions.create({ model, prompt: "The capital of France is", max_tokens: 8, echo: false, best_of: 1 })).choices[0].text));
await call("completions, streamed", async () => {
  let whole = "";
  for await (const chunk of await client.completions.create({ model, prompt: "The capital of France is", max_tokens: 8, stream: true })) whole += chunk.choices[0].text;
  assert.ok(whole);
});
await call("embeddings", async () => {
  const [one, other] = (await client.embeddings.create({ model, input: ["Paris", "a bicycle"] })).data;
  const plain = (await client.embeddings.create({ model, input: "Paris", encoding_format: "float" })).data[0].embedding;
  assert.ok(Math.abs(plain.reduce((sum, value, index) => sum + value * one.embedding[index], 0) - 1) < 1e-3);
  assert.equal(other.embedding.length, plain.length);
});
await call("tools, required", () => called("required"));
await call("tools, named, and its result", async () => {
  const first = await called({ type: "function", function: { name: "get_weather" } });
  const result = { role: "tool", tool_call_id: first.tool_calls[0].id, content: "rain" };
  await text(chat({ messages: [...messages, first, result], tools: [weather] }, withTools));
});
await call("tools, required, streamed", async () => {
  const stream = withTools.chat.completions.stream({ model, messages, tools: [weather], tool_choice: "required", max_tokens: 100 });
  const final = await stream.finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.name, "get_weather");
});
await call("n=2 is refused", () => assert.rejects(chat({ n: 2 }), /n is not supported/));
console.log(JSON.stringify({ client: `openai (JavaScript) ${version}`, calls: done }));
process.exit(done.every((item) => item.ok) ? 0 : 1);
