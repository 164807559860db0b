/* The page of a running server: feeds the player with steps as they come, and has a chat box. */

/* The player keeps this many steps, and forgets the oldest. */
const STEPS_KEPT = 600;

/** Server-sent events of a response, one by one as [kind, data]. EventSource can send no key. */
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const kind = /^event: (.*)$/m.exec(event);
      const data = /^data: (.*)$/m.exec(event);
      if (data) yield [kind ? kind[1] : "message", data[1]];
    }
  }
}

class LivePage {
  constructor(options, about) {
    this.options = options;
    this.about = about;
    this.key = "";
    this.messages = [];
    this.root = document.getElementById("player");
    this.side = document.getElementById("side");
    this.buildSide();
    if (!about.needsKey) this.watch();
  }

  make(tag, more = {}, ...inside) {
    const node = Object.assign(document.createElement(tag), more);
    node.append(...inside);
    return node;
  }

  headers() {
    return this.key ? { Authorization: `Bearer ${this.key}` } : {};
  }

  buildSide() {
    const make = this.make;
    this.state = make("p", { className: "live-state" });
    this.state.setAttribute("role", "status");
    this.side.append(this.state);
    if (!this.about.showsText) {
      const text = "Texts are hidden. Start the server with --show-text to see them in the player.";
      this.side.append(make("p", { className: "live-note", textContent: text }));
    }
    if (this.about.needsKey) this.side.append(this.keyForm());
    if (this.about.hasChat) this.side.append(...this.chat());
  }

  keyForm() {
    const field = this.make("input", { type: "password", autocomplete: "off" });
    field.setAttribute("aria-label", "API key");
    const form = this.make("form", { className: "live-key" }, field);
    form.append(this.make("button", { textContent: "Use this API key" }));
    form.onsubmit = (event) => {
      event.preventDefault();
      this.key = field.value;
      this.watch();
    };
    return form;
  }

  /* --- the steps ---------------------------------------------------------------------------- */

  say(text) {
    this.state.textContent = text;
  }

  /** Read the engine's steps; when the connection ends, try again every two seconds. */
  async watch() {
    const turn = (this.turn = (this.turn || 0) + 1);
    while (turn === this.turn) {
      try {
        const response = await fetch("events", { headers: this.headers() });
        if (response.status === 401) {
          this.say("The server does not know this API key.");
          return;
        }
        if (!response.ok) throw new Error(response.status);
        this.say("Connected. The player shows each step as it happens.");
        for await (const [kind, data] of readEvents(response)) {
          if (turn !== this.turn) return;
          if (kind === "start") this.start(JSON.parse(data));
          else if (kind === "step") this.step(JSON.parse(data));
        }
      } catch {
        /* The server is gone, or not there yet. */
      }
      this.say("Not connected: the server does not answer.");
      await new Promise((done) => setTimeout(done, 2000));
    }
  }

  start(sizes) {
    this.player = window.player = new MinivllmPlayer(this.root, sizes, this.options);
    this.player.showIdle();
  }

  step(step) {
    this.player.push(step, step.new, STEPS_KEPT);
  }

  /* --- the chat ----------------------------------------------------------------------------- */

  chat() {
    const make = this.make;
    this.talk = make("div", { className: "live-talk" });
    this.talk.setAttribute("aria-live", "polite");
    this.field = make("textarea", { rows: 3, placeholder: "Tell me a story about a fox." });
    this.field.setAttribute("aria-label", "Your message");
    this.sendButton = make("button", { type: "submit", textContent: "Send" });
    this.stopButton = make("button", { type: "button", textContent: "Stop", hidden: true });
    this.stopButton.onclick = () => this.abort && this.abort.abort();
    const again = make("button", { type: "button", textContent: "New chat" });
    again.onclick = () => {
      if (this.abort) this.abort.abort();
      this.messages = [];
      this.talk.replaceChildren();
    };
    const form = make("form", { className: "live-form" }, this.field, this.sendButton);
    form.append(this.stopButton, again);
    form.onsubmit = (event) => {
      event.preventDefault();
      this.ask();
    };
    this.field.onkeydown = (event) => {
      event.stopPropagation(); // the player has keys of its own
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        this.ask();
      }
    };
    return [make("h2", { textContent: "Chat" }), this.talk, form];
  }

  bubble(role, text = "") {
    const node = this.make("p", { className: `live-${role}`, textContent: text });
    this.talk.append(node);
    node.scrollIntoView({ block: "nearest" });
    return node;
  }

  async ask() {
    const text = this.field.value.trim();
    if (!text || this.abort) return;
    this.field.value = "";
    this.bubble("user", text);
    this.messages.push({ role: "user", content: text });
    const node = this.bubble("assistant");
    this.abort = new AbortController();
    this.busy(true);
    try {
      await this.stream(node);
      this.messages.push({ role: "assistant", content: node.textContent });
    } catch (error) {
      if (error.name === "AbortError") node.append(" (stopped)");
      else
        node.replaceWith(this.make("p", { className: "live-error", textContent: error.message }));
      this.messages.pop();
    } finally {
      this.abort = null;
      this.busy(false);
      this.field.focus();
    }
  }

  busy(is) {
    this.sendButton.hidden = is;
    this.stopButton.hidden = !is;
  }

  async stream(node) {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...this.headers() },
      body: JSON.stringify({ messages: this.messages, stream: true, max_tokens: 400 }),
      signal: this.abort.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const [, data] of readEvents(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      node.append(chunk.choices[0].delta.content || "");
      node.scrollIntoView({ block: "nearest" });
    }
  }
}
