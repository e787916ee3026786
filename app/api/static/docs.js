// Shows the OpenAPI document with Swagger UI. After a batch was sent from the page, its id and that of its first job
// are filled in wherever an operation asks for one, so that the next step works as it stands.
"use strict";

const ui = SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: "/openapi.json",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "list",
  persistAuthorization: false,
  tryItOutEnabled: true,
  validatorUrl: null,
  responseInterceptor: (response) => {
    if (response.url.endsWith("/v1/batches") && (response.status === 202 || response.status === 200)) {
      offer(response).catch(() => {});
    }
    return response;
  },
});

async function offer(response) {
  const batch = response.body ?? JSON.parse(response.text);
  if (!batch.links || !batch.id) return;
  fill("batch_id", batch.id);
  const headers = {};
  const token = ui.authSelectors.authorized().getIn(["token", "value"]);
  if (token) headers["Authorization"] = "Bearer " + token;
  const answer = await fetch(batch.links.jobs + "?limit=1", { headers });
  const jobs = await answer.json();
  if (jobs.data && jobs.data.length) fill("job_id", jobs.data[0].id);
}

function fill(name, value) {
  const paths = ui.specSelectors.specJson().get("paths");
  paths.forEach((operations, path) => {
    operations.forEach((operation, method) => {
      const parameters = operation.get("parameters");
      if (!parameters) return;
      parameters
        .filter((parameter) => parameter.get("in") === "path" && parameter.get("name") === name)
        .forEach((parameter) => ui.specActions.changeParamByIdentity([path, method], parameter, value));
    });
  });
}
