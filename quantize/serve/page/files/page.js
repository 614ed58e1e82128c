"use strict";
const byId = (id) => document.getElementById(id);
const history_ = [];
let running = null;
const root = document.documentElement.dataset.root;

async function refresh() {
  try {
    const [health, ready] = await Promise.all([fetch(root + "/health"), fetch(root + "/ready")].map(async (r) => (await r).json()));
    byId("state").textContent = ready.status;
    byId("state").title = ready.reason || "";
    byId("live").textContent = health.active_requests;
    byId("waiting").textContent = health.waiting_requests;
    byId("memory").textContent = `${health.memory_rss_mb.toFixed(0)} MB`;
    byId("machine").textContent = health.memory.replace("[Now] ", "");
    showModels(ready.models);
  } catch {
    byId("state").textContent = "the gateway does not answer";
  }
}

function showModels(models) {
  const rows = Object.entries(models).map(([name, model]) => {
    const row = document.createElement("tr");
    const layers = Object.entries(model.devices || {}).map(([device, count]) => `${device}: ${count}`).join(", ");
    for (const text of [name, model.reason || model.state, model.runtime, model.context || "", layers || model.device || ""]) {
      row.insertCell().textContent = text;
    }
    return row;
  });
  byId("models").replaceChildren(...rows);
  const select = byId("model");
  const names = Object.keys(models);
  if (select.options.length !== names.length) {
    select.replaceChildren(...names.map((name) => new Option(name, name)));
  }
}

function addMessage(role, text) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  box.textContent = text;
  byId("messages").append(box);
  box.scrollIntoView({ block: "nearest" });
  return box;
}

async function send(text) {
  history_.push({ role: "user", content: text });
  addMessage("user", text);
  const box = addMessage("assistant", "");
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  const started = performance.now();
  let answer = "";
  try {
    const headers = { "content-type": "application/json" };
    if (byId("key").value) headers.authorization = `Bearer ${byId("key").value}`;
    const body = { model: byId("model").value || undefined, messages: history_, temperature: Number(byId("temperature").value), stream: true, stream_options: { include_usage: true } };
    const response = await fetch(root + "/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        answer += piece;
        box.textContent = answer;
        box.scrollIntoView({ block: "nearest" });
      }
      if (event.usage) {
        const seconds = (performance.now() - started) / 1000;
        byId("note").textContent = `${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s by ${event.model}`;
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      box.className = "message error";
      box.textContent = error.message;
    }
  }
  if (answer) history_.push({ role: "assistant", content: answer });
  else history_.pop();
  running = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("text").value.trim();
  if (!text || running) return;
  byId("text").value = "";
  send(text);
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", () => {
  running?.abort();
  history_.length = 0;
  byId("messages").replaceChildren();
  byId("note").textContent = "";
});
refresh();
setInterval(refresh, 2000);
